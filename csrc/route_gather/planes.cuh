// Planes in shared memory: all tokens, or all steps of a route, of a few channels, read once from
// memory along it and then picked from in any order.
//
//   32 words and one to spare, 32 words and one to spare, ..; another one after every 1024
//
// Columns of a map, reversed packs and most other routes pick words a fixed number apart. Without
// the spare words a power of two in that number would send 32 lanes to few banks; with them, strides
// of 1, 2, 4, .. 512 words and those of maps 7, 14, 28, 56 wide meet all 32 or nearly so.
#pragma once

#include <cstdint>

#include "common/device_view.cuh"
#include "common/divisor.h"
#include "common/shared.cuh"
#include "common/view.h"

namespace statescan::route_gather::cuda {

// Every GPU since Volta but Turing has so much for a block. Two blocks fill an SM of H100.
inline constexpr int64_t kSharedBytes = 96 * 1024;

// Where element i of a plane lies.
template <class E>
STATESCAN_HOST_DEVICE constexpr int skewed(int i) {
  constexpr int kInWord = 4 / int(sizeof(E));
  const int word = i / kInWord;
  return i + ((word >> 5) + (word >> 10)) * kInWord;
}

// Elements from one plane of n to the next. Element n is there as well: the zero of steps that visit
// no token.
template <class E>
STATESCAN_HOST_DEVICE constexpr int64_t plane_pitch(int64_t n) {
  constexpr int64_t kInWord = 4 / int64_t(sizeof(E));
  return (skewed<E>(int(n)) / kInWord + 1) * kInWord;
}

// How the planes of a block lie in memory.
struct Staging {
  bool along_channels;  // neighbours in memory are channels, not places of a plane
  bool packed;          // read 16 bytes at a time
  SmallDivisor inner;   // packs along that dimension

  // n places of `channels` channels; `stride` is that of the other dimension, `aligned` says that
  // all but it allows packs.
  static Staging of(const View<4>& v, int64_t channels, int64_t n, int64_t pack) {
    const bool along_channels = v.stride[2] == 1 && v.stride[3] != 1;
    const int64_t size = along_channels ? channels : n;
    const int64_t other = along_channels ? v.stride[3] : v.stride[2];
    const bool packed = size % pack == 0 && other % pack == 0 && v.stride[0] % pack == 0 &&
                        v.stride[1] % pack == 0 && (along_channels || v.stride[3] == 1) &&
                        reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
    return {along_channels, packed, SmallDivisor(packed ? size / pack : size)};
  }
};

// A block's n places of `channels` channels at `from`, to be read into planes.
template <class E>
struct Source {
  const E* from;
  int64_t channel_stride, place_stride;
  int channels, n;
};

// Loads of kWidth elements at a time, which `store(to, loaded)` puts into a plane.
template <int kWidth, class Load, class E, class Store>
__device__ __forceinline__ void stage_by(E* planes, int pitch, const Source<E>& source,
                                         const Staging& s, Store&& store) {
  constexpr int kLoads = 4;
  const unsigned outer = unsigned(s.along_channels ? source.n : source.channels);
  const unsigned tasks = outer * s.inner.divisor;
  for (unsigned first = threadIdx.x; first < tasks; first += kLoads * blockDim.x) {
    Load loaded[kLoads];
    int channel[kLoads], place[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {  // on their way together; past the end the last once more
      const unsigned task = first + i * blockDim.x;
      unsigned at;
      const unsigned row = s.inner.divide(task < tasks ? task : tasks - 1, at);
      channel[i] = s.along_channels ? int(at) * kWidth : int(row);
      place[i] = s.along_channels ? int(row) : int(at) * kWidth;
      const int there = channel[i] < source.channels ? channel[i] : source.channels - kWidth;
      loaded[i] = __ldg(reinterpret_cast<const Load*>(source.from + there * source.channel_stride +
                                                      place[i] * source.place_stride));
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * blockDim.x >= tasks || channel[i] >= source.channels) continue;
      store(planes + channel[i] * pitch + skewed<E>(place[i]), loaded[i]);
    }
  }
}

// Reads planes. Ends without a barrier.
template <class E>
__device__ __forceinline__ void stage(E* planes, int pitch, const Source<E>& source,
                                      const Staging& s) {
  constexpr int kPack = 16 / int(sizeof(E)), kInWord = 4 / int(sizeof(E));
  if (!s.packed) {
    stage_by<1, E>(planes, pitch, source, s, [](E* to, E x) { *to = x; });
  } else if (s.along_channels) {
    stage_by<kPack, uint4>(planes, pitch, source, s, [&](E* to, const uint4& x) {
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        to[i * pitch] = E(words[i / kInWord] >> (i % kInWord * 8 * sizeof(E)));
      }
    });
  } else {  // the words of a pack lie side by side in a plane, too
    stage_by<kPack, uint4>(planes, pitch, source, s, [](E* to, const uint4& x) {
      uint32_t* words = reinterpret_cast<uint32_t*>(to);
      words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
    });
  }
}

// Elements as they were read, side by side.
template <class E, int kCount>
__device__ __forceinline__ uint4 packed(const E (&x)[kCount]) {
  static_assert(kCount * sizeof(E) == 16);
  constexpr int kInWord = 4 / int(sizeof(E));
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    words[i / kInWord] |= uint32_t(x[i]) << (i % kInWord * 8 * sizeof(E));
  return {words[0], words[1], words[2], words[3]};
}

// kCount entries of a table from an address that is a multiple of 16 bytes.
template <int kCount>
__device__ __forceinline__ void load_entries(const int32_t* p, int (&x)[kCount]) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint4 four = __ldg(reinterpret_cast<const uint4*>(p + i));
    x[i] = int(four.x), x[i + 1] = int(four.y), x[i + 2] = int(four.z), x[i + 3] = int(four.w);
  }
}

}  // namespace statescan::route_gather::cuda
