// How the selective scan's blocks, warps and lanes share out channels and states.
//
//   block: channels of one group of B and C, one part of a sequence, tile after tile of kSteps steps
//   warp:  kWarpChannels of them             lane = q kRow + r:  channels kC r .. of its warp,
//                                                                states kS q .. of a block of states
#pragma once

#include "common/device_view.cuh"
#include "common/lanes.cuh"
#include "common/marks.cuh"
#include "common/scalar.cuh"
#include "common/shared.cuh"
#include "selective_scan/cuda.h"

#include "selective_scan/equations.h"

namespace statescan::selective_scan::cuda {

inline constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class R_, int kChannelsOfLane, int kStatesOfLane, int kLanes, int kWarpsOfBlock,
          bool kAny_>
struct Config {
  using R = R_;
  static constexpr int kC = kChannelsOfLane, kS = kStatesOfLane, kL = kLanes;
  static constexpr int kWarps = kWarpsOfBlock, kThreads = 32 * kWarps;
  static constexpr bool kAny = kAny_;  // constant B or C, all states
  static constexpr int kRow = 32 / kL, kWarpChannels = kRow * kC,
                       kChannels = kWarps * kWarpChannels;
  static constexpr int kStates = kS * kL;  // walked at a time
  static constexpr int kKept = kC * kS;    // of a lane
  // Steps of one channel that a thread takes care of outside of the walk, in all and at a time. The
  // mathematics of doubles is long: once is enough of it.
  static constexpr int kOwn = kSteps * kChannels / kThreads;
  static constexpr int kRun = sizeof(R) == 8 ? 1 : kOwn < 8 ? kOwn : 8;
  // Two more than the channels: lanes that write steps of 16, 8 or 4 channels meet in no bank.
  static constexpr int kPitch = kChannels + (sizeof(R) == 4 ? 2 : 0);
  // Steps are read as rows of 4 states; where those of several lanes differ, without conflicts.
  static constexpr int kStatePitch = kStates + (kL == 1 ? 0 : 4);
  // Steps whose h and a the backward holds in registers, and those of them that it sums up
  // together.
  static constexpr int kSummed = 16 / kL, kHeld = kKept == 8 ? 8 : kSummed;
  // Blocks on an SM, for launch bounds: as many as do without spilling.
  static constexpr int kBlocks = kL == 1 ? 8 : 4, kPartBlocks = kL == 1 ? 6 : kWarps == 4 ? 3 : 4;
  static constexpr int kBwdBlocks = kWarps == 2 ? 4 : kKept == 8 ? 2 : 3;
};
using Narrow = Config<float, 1, 1, 1, 2, false>;
using Wide = Config<float, 1, 16, 1, 2, false>;
using WideBack = Config<float, 2, 4, 4, 4, false>;
using AnyFloat = Config<float, 1, 4, 4, 4, true>;
using AnyDouble = Config<double, 1, 4, 4, 2, true>;

// Calls f(the Config of a layout). WideLayout: Wide, or WideBack for the backward.
template <class WideLayout, class F>
inline void with_layout(Layout layout, DType compute, F&& f) {
  if (layout == Layout::kNarrow) return f(Narrow{});
  if (layout == Layout::kWide) return f(WideLayout{});
  if (compute == DType::kFloat32) return f(AnyFloat{});
  f(AnyDouble{});
}

template <class C>
using Tile = SharedArray<typename C::R, kSteps * C::kPitch>;
template <class C>
using StateTile = SharedArray<typename C::R, kSteps * C::kStatePitch>;

// One block's share of a launch.
struct Task {
  int64_t part, b, group, block;  // block: of the group's channels
  int64_t channel;                // the first
  int channels;
  int64_t first, end;  // tiles, in the order of the scan
};

// `skipped`: parts that take no part.
template <class C>
__device__ __forceinline__ Task task_at(const Inputs& p, int64_t i, int64_t skipped = 0) {
  const int64_t blocks = (p.group_dim() + C::kChannels - 1) / C::kChannels;
  Task t;
  t.block = i % blocks, i /= blocks;
  t.group = i % p.groups, i /= p.groups;
  t.b = i % p.batch, t.part = i / p.batch + skipped;
  t.channel = t.group * p.group_dim() + t.block * C::kChannels;
  const int64_t left = p.group_dim() - t.block * C::kChannels;
  t.channels = left < C::kChannels ? int(left) : C::kChannels;
  t.first = p.tiles() * t.part / p.parts, t.end = p.tiles() * (t.part + 1) / p.parts;
  return t;
}

// A tile's first step in time, and how many there are of it.
struct Span {
  int64_t tile, begin;
  int steps;
};

// The i-th tile in the order of the scan.
__device__ __forceinline__ Span span_at(const Shape& p, int64_t tiles, int64_t i) {
  const int64_t tile = p.reverse ? tiles - 1 - i : i, begin = tile * kSteps;
  const int64_t left = p.seqlen - begin;
  return {tile, begin, left < kSteps ? int(left) : kSteps};
}

// The place of step t of a tile, counted in time, in the order of the scan; and the other way
// round. In shared memory steps lie in the order of the scan.
__device__ __forceinline__ int in_scan(const Shape& p, int t) {
  return p.reverse ? kSteps - 1 - t : t;
}

template <class C>
struct Lane {
  int warp, lane;
  int q = lane / C::kRow;                                          // which states
  int channel = warp * C::kWarpChannels + lane % C::kRow * C::kC;  // the first, in the block

  __device__ __forceinline__ explicit Lane(int thread = int(threadIdx.x))
      : warp(thread / 32), lane(thread % 32) {}
};

// What a lane keeps of a table (dim, state), or (channel, state) of B and C that are constant.
template <class C>
__device__ __forceinline__ void load_table(const View<2>& x, const Shape& p, const Task& task,
                                           int first, typename C::R scale,
                                           typename C::R (&table)[C::kC][C::kS]) {
  using R = typename C::R;
  const Lane<C> lane;
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma unroll
    for (int c = 0; c < C::kC; ++c) {
#pragma unroll
      for (int s = 0; s < C::kS; ++s) {
        const int64_t n = first + lane.q * C::kS + s;
        const bool there = lane.channel + c < task.channels && n < p.state;
        table[c][s] = there ? scale * R(to_number(static_cast<const T*>(
                                          x.data)[(task.channel + lane.channel + c) * x.stride[0] +
                                                  n * x.stride[1]]))
                            : R(0);
      }
    }
  });
}

// Where a lane's states lie in a contiguous tensor: f(pointer to the number, c, s) for those that
// there are. Rows are (dim, state) or with `by_state` (state, dim).
template <class C, class T, class F>
__device__ __forceinline__ void for_states(T* row, bool by_state, const Shape& p, const Task& task,
                                           int first, F&& f) {
  const Lane<C> lane(ptx::opaque(int(threadIdx.x)));
#pragma unroll
  for (int c = 0; c < C::kC; ++c) {
    const int64_t d = task.channel + lane.channel + c;
#pragma unroll
    for (int s = 0; s < C::kS; ++s) {
      const int64_t n = first + lane.q * C::kS + s;
      if (lane.channel + c < task.channels && n < p.state) {
        f(row + (by_state ? n * p.dim + d : d * p.state + n), c, s);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void load_states(const typename C::R* row, bool by_state, const Shape& p,
                                            const Task& task, int first,
                                            typename C::R (&h)[C::kC][C::kS]) {
#pragma unroll
  for (int c = 0; c < C::kC; ++c) {
#pragma unroll
    for (int s = 0; s < C::kS; ++s) h[c][s] = 0;
  }
  if (row == nullptr) return;
  for_states<C>(row, by_state, p, task, first,
                [&](const typename C::R* from, int c, int s) { h[c][s] = *from; });
}

template <class C>
__device__ __forceinline__ void store_states(typename C::R* row, bool by_state, const Shape& p,
                                             const Task& task, int first,
                                             const typename C::R (&h)[C::kC][C::kS]) {
  for_states<C>(row, by_state, p, task, first,
                [&](typename C::R* to, int c, int s) { *to = h[c][s]; });
}

// Of a tile, for all threads. Two of them take turns, so that no thread has to wait before it
// begins the next.
struct TileInfo {
  Span span;
  unsigned inside;                    // bit t: step t, counted in time, is there and is no padding
  SharedArray<int, kSteps> mark;      // of steps in the order of the scan
  SharedArray<int64_t, kSteps> slot;  // where a mark says that there is one
};

// The state that a start starts from.
template <class C>
__device__ __forceinline__ void load_start(const Inputs& p, const Task& task, TileInfo& info,
                                           int step, int first, typename C::R (&h)[C::kC][C::kS]) {
  const bool from_slot = p.initial != nullptr && info.mark[step] & kFromSlot;
  load_states<C>(
      from_slot ? static_cast<const typename C::R*>(p.initial) + info.slot[step] * p.dim * p.state
                : nullptr,
      false, p, task, first, h);
}

// Sums over the lanes that share channels: lane q gets those of v[q kCount / kL] and on, in front.
template <class C, int kCount, int kLanes = C::kL / 2>
__device__ __forceinline__ void sum_over_states(typename C::R (&v)[kCount], int q) {
  static_assert(kCount % C::kL == 0);
  if constexpr (kLanes > 0) {
    constexpr int kHalf = kCount / C::kL * kLanes;
    const bool high = q & kLanes;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const auto send = high ? v[i] : v[i + kHalf], keep = high ? v[i + kHalf] : v[i];
      v[i] = keep + __shfl_xor_sync(kAllLanes, send, kLanes * C::kRow);
    }
    sum_over_states<C, kCount, kLanes / 2>(v, q);
  }
}

// Bits of kCount steps.
template <int kCount>
__device__ __forceinline__ unsigned all_of() {
  return (1u << kCount) - 1;
}

// A thread's share of the work on single elements of a tile: kOwn steps of one channel.
template <class C>
struct Column {
  static constexpr int kShares = kSteps / C::kOwn;  // of a channel
  int c = int(threadIdx.x) / kShares, t0 = int(threadIdx.x) % kShares * C::kOwn;

  template <class R>
  __device__ __forceinline__ R parameter(const View<1>& x, const Task& task,
                                         int64_t repeat = 1) const {
    if (!x || c >= task.channels) return R(0);
    return load_element<R>(x.data, x.dtype, (task.channel + c) / repeat * x.stride[0]);
  }

  // Calls f(first step in time, bits of the steps that are inside) for kRun steps at a time.
  template <class F>
  __device__ __forceinline__ void for_runs(const Task& task, const TileInfo& info, F&& f) const {
    const unsigned inside = c < task.channels ? info.inside : 0;
#pragma unroll 1
    for (int t = t0; t < t0 + C::kOwn; t += C::kRun) f(t, inside >> t & all_of<C::kRun>());
  }
  // Where a channel's step t, counted in time, is in a tile.
  __device__ __forceinline__ int at(const Shape& p, int t) const {
    return in_scan(p, t) * C::kPitch + c;
  }
};

// The step size, and its derivative with respect to delta.
template <class R>
__device__ __forceinline__ R step_size(R delta, R bias, bool apply_softplus, R& slope) {
  slope = 1;
  return apply_softplus ? softplus(delta + bias, slope) : delta + bias;
}
template <class R>
__device__ __forceinline__ R step_size(R delta, R bias, bool apply_softplus) {
  R slope;
  return step_size(delta, bias, apply_softplus, slope);
}

// Waits until what has been fetched for a tile is in place, and says what the tile is. True if a
// sequence starts or ends in it.
__device__ __forceinline__ bool begin_tile(const Inputs& p, const Task& task, int64_t tile,
                                           TileInfo& info) {
  ptx::cp_async_wait<0>();
  int mark = 0;
  if (threadIdx.x < 32) {
    const Span span = span_at(p, p.tiles(), tile);
    const int t = int(threadIdx.x);
    if (t < span.steps && p.marks != nullptr) mark = p.marks[task.b * p.seqlen + span.begin + t];
    const unsigned inside = __ballot_sync(kAllLanes, t < span.steps && !(mark & kPadding));
    if (t == 0) info.span = span, info.inside = inside;
    if (t < kSteps) {
      const int step = in_scan(p, t);
      info.mark[step] = mark;
      info.slot[step] = mark & (kFromSlot | kToSlot)
                            ? marked_slot(p.sequences, p.slots_per_row, task.b, span.begin + t)
                            : 0;
    }
  }
  return __syncthreads_or(mark & (kStart | kToSlot)) != 0;  // operands and marks are in place
}

}  // namespace statescan::selective_scan::cuda
