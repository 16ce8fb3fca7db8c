// Puts together what the lanes of a warp make of a state, for all channels that a lane has.
#pragma once

#include "common/lanes.cuh"

namespace statescan::selective_scan_2d::cuda {

// A map h -> a h + b.
struct Map {
  float a = 1, b = 0;
};
__device__ __forceinline__ Map then(const Map& first, const Map& second) {
  return {second.a * first.a, second.a * first.b + second.b};
}
__device__ __forceinline__ Map choose(bool which, const Map& x, const Map& y) {
  return {which ? x.a : y.a, which ? x.b : y.b};
}
template <class F>
__device__ __forceinline__ Map from_lane(const Map& x, F&& shuffle) {
  return {shuffle(x.a), shuffle(x.b)};
}

// Puts together the maps of the lanes' steps of all channels, kBack: from the last lane to the first.
// Neighbouring lanes deal the channels out among them, so that each has one channel of all of them: of two
// channels one scan over 16 pairs of lanes does for two over 32; of four one over 8 for four.
template <int kChannels, bool kBack>
struct ChannelScan {
  int lane;
  Map before[kChannels - 1];  // of those that come first, of 1, 2, .. channels: see enter()
  Map all;                    // of all lanes until these, of channel lane % kChannels

  __device__ __forceinline__ ChannelScan(int lane, const Map (&maps)[kChannels]) : lane(lane) {
    Map map[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) map[c] = maps[c];
    // Lanes that differ in a bit keep the channels whose number has it as theirs has.
#pragma unroll
    for (int left = kChannels / 2, bit = 1; left > 0; left /= 2, bit *= 2) {
      const bool odd = lane & bit;
#pragma unroll
      for (int k = 0; k < left; ++k) {
        const Map mine = choose(odd, map[2 * k + 1], map[2 * k]);
        const Map other = choose(odd, map[2 * k], map[2 * k + 1]);
        const Map theirs =
            from_lane(other, [&](float x) { return __shfl_xor_sync(kAllLanes, x, bit); });
        before[left - 1 + k] = choose(odd == kBack, mine, theirs);
        map[k] = then(before[left - 1 + k], choose(odd == kBack, theirs, mine));
      }
    }
    all = map[0];
#pragma unroll
    for (int lanes = kChannels; lanes < 32; lanes *= 2) {
      const Map x = from_lane(all, [&](float x) { return from(x, lanes); });
      if (passed() >= lanes) all = then(x, all);
    }
  }
  __device__ __forceinline__ static float from(float x, int lanes) {
    return kBack ? __shfl_down_sync(kAllLanes, x, lanes) : __shfl_up_sync(kAllLanes, x, lanes);
  }
  __device__ __forceinline__ int passed() const { return kBack ? 31 - lane : lane; }
  // Does the lane have, in `all`, the map of all lanes for its channel?
  __device__ __forceinline__ bool is_last() const { return passed() >= 32 - kChannels; }

  // What the lane's steps start from, if those of all lanes start from `start`, of the lane's channel.
  __device__ __forceinline__ void enter(float start, float (&h)[kChannels]) const {
    h[0] = from(all.a * start + all.b, kChannels);
    if (passed() < kChannels) h[0] = start;
#pragma unroll
    for (int left = 1, bit = kChannels / 2; bit > 0; left *= 2, bit /= 2) {
      const bool odd = lane & bit, first = odd == kBack;
#pragma unroll
      for (int k = left - 1; k >= 0; --k) {
        const Map& map = before[left - 1 + k];
        const float middle = map.a * h[k] + map.b;
        const float theirs = __shfl_xor_sync(kAllLanes, first ? middle : h[k], bit);
        const float mine = first ? h[k] : middle;
        h[2 * k] = odd ? theirs : mine, h[2 * k + 1] = odd ? mine : theirs;
      }
    }
  }
};

}  // namespace statescan::selective_scan_2d::cuda
