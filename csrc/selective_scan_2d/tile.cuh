// How the selective scan along routes lies on the GPU, and what its forward and backward share.
//
//   block:  a batch element and at most 8 channels, along all routes, one after the other
//   warp:   a channel of them: its planes of tokens (u, y, ..) belong to it alone
//   lane:   kItems neighbouring steps of a tile
//
// So what is added to a token is added by one warp in a fixed order. The recurrence of a tile is a scan
// over lanes of maps h -> a h + b.
//
// Narrow operands (B, C, delta) come to shared memory as numbers to compute with, [row][step], for all
// channels of the block, in passes of at most kRows rows. The warps that have no channel bring the next
// pass while the others compute; one barrier ends both.
#pragma once

#include "common/lanes.cuh"
#include "common/shared.cuh"
#include "route_gather/planes.cuh"
#include "selective_scan_2d/cuda.h"

namespace statescan::selective_scan_2d::cuda {

inline constexpr int kRows = 16;   // of narrow operands, in shared memory at a time
inline constexpr int kStates = 8;  // in so many rows, where they are not all of the operands

// Where a token is in its plane: with spare words, see planes.cuh.
STATESCAN_HOST_DEVICE constexpr int in_plane(int token) {
  return route_gather::cuda::skewed<uint32_t>(token);
}
STATESCAN_HOST_DEVICE constexpr int64_t plane_pitch(int64_t tokens) {
  return in_plane(int(tokens)) + 1;
}

// kFast: planes are in shared memory, the state never starts anew, and the backward does not need y.
// Without it a tile of 64 steps has lanes to spare.
// kTogether: all rows of narrow operands come in one pass. kHalves: u and dy of the backward, both of one
// 16-bit type, share a word.
template <class R_, int kItemsOfLane, bool kFast_, bool kTogether_, bool kHalves_ = false>
struct Config {
  using R = R_;
  static constexpr int kItems = kItemsOfLane, kSteps = 32 * kItems;
  static constexpr bool kFast = kFast_, kTogether = kTogether_, kHalves = kHalves_;
  static constexpr int kFwdBlocks = kTogether || kItems == 2 && sizeof(R) == 4 ? 2 : 1;  // on an SM
  using Items = R[kItems];
};
using Fast = Config<float, 8, true, true>;
using FastHalves = Config<float, 8, true, true, true>;
using FastPasses = Config<float, 8, true, false>;
using FastShort = Config<float, 2, true, false>;
using Any = Config<float, 8, false, false>;
using AnyDouble = Config<double, 2, false, false>;

template <bool kBackward, class F>
inline void with_config(const Inputs& p, F&& f) {
  if (p.compute == DType::kFloat64) return f(AnyDouble{});
  if (!p.plan.fast) return f(Any{});
  if (p.chunk == kShortTile) return f(FastShort{});
  if (!p.plan.together) return f(FastPasses{});
  if constexpr (kBackward) {
    if (p.plan.halves) return f(FastHalves{});
  }
  f(Fast{});
}

// One block's share of a launch.
struct Task {
  int64_t b, block, channel;  // block: of channels; channel: the first
  int channels;
};
__device__ __forceinline__ Task task_at(const Inputs& p, int64_t i) {
  Task t;
  t.b = i / p.plan.blocks, t.block = i % p.plan.blocks;
  t.channel = t.block * p.plan.channels;
  const int64_t left = p.dim - t.channel;
  t.channels = left < p.plan.channels ? int(left) : p.plan.channels;
  return t;
}

// The first token of the block's first channel, along a route if the map has some.
template <class T>
__device__ __forceinline__ T* first_token(const View<4>& x, const Task& task, int64_t route = 0) {
  return static_cast<T*>(x.data) + task.b * x.stride[0] + route * x.stride[1] +
         task.channel * x.stride[2];
}

// The token of a step, or what it is instead.
__device__ __forceinline__ int token_at(const Inputs& p, int64_t table, int64_t route, int64_t t) {
  const int64_t at = table * p.index_stride[0] + route * p.index_stride[1] + t * p.index_stride[2];
  const int64_t token = p.index_is_wide ? __ldg(static_cast<const int64_t*>(p.index) + at)
                                        : __ldg(static_cast<const int32_t*>(p.index) + at);
  if (token >= 0 && token < p.tokens) return int(token);
  return token == kSkip ? int(kSkip) : int(kGhost);
}

// A piece of a route.
struct Tile {
  int64_t b, route, i, begin;  // the i-th of its route; its first step
  int steps;                   // there may be fewer than a tile has at the end
  int flags;
  const int32_t* place;
};
__device__ __forceinline__ Tile tile_at(const Inputs& p, int64_t b, int64_t route, int64_t i) {
  const int64_t row = ((p.place_per_batch ? b : 0) * p.routes + route) * p.tiles + i;
  const int64_t begin = i * p.chunk, left = p.steps - begin;
  return {b,
          route,
          i,
          begin,
          left < p.chunk ? int(left) : int(p.chunk),
          int(__ldg(p.flags + row)),
          p.place + row * p.chunk};
}

// Where a block is: in shared memory, since what follows from it would fill the registers.
struct alignas(32) Now {
  Task task;
  int64_t route;
  SharedArray<Tile, 2> tile;  // the i-th in i % 2: while one is walked, the next is prepared
};
inline constexpr int kNowBytes = int(sizeof(Now));

// The shared memory of a block: where it is, two buffers of rows, shares (of the backward), dt_weight
// (rank, warp), tables of each channel, planes.
template <class C>
struct Memory {
  using R = typename C::R;
  Now& now;
  R *row, *share, *dt_weight, *table, *plane;

  __device__ __forceinline__ explicit Memory(const Inputs& p, int shares, int planes)
      : now(*dynamic_shared<Now>()),
        row(reinterpret_cast<R*>(&now + 1)),
        share(row + 2 * p.plan.rows * C::kSteps),
        dt_weight(share + shares * kWarps * C::kSteps),
        table(dt_weight + p.rank * kWarps),
        plane(table + p.plan.channels * p.plan.table) {
    if (!C::kFast && p.planes != nullptr) {
      plane =
          static_cast<R*>(p.planes) + int64_t(blockIdx.x) * planes * p.plan.channels * p.plan.pitch;
    }
  }
  __device__ __forceinline__ R* buffer(const Inputs& p, int i) const {
    return row + (i & 1) * p.plan.rows * C::kSteps;
  }
};

// A warp's channel.
template <class C>
struct Own {
  using R = typename C::R;
  const Inputs& p;
  const Memory<C>& memory;
  // From lane 0, which tells the compiler that it is the same in all lanes.
  int warp = __shfl_sync(kAllLanes, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;

  __device__ __forceinline__ bool is_there() const { return warp < memory.now.task.channels; }
  __device__ __forceinline__ int64_t b() const { return memory.now.task.b; }
  __device__ __forceinline__ int64_t route() const { return memory.now.route; }
  __device__ __forceinline__ int64_t channel() const { return memory.now.task.channel + warp; }
  __device__ __forceinline__ R* dt_weight() const { return memory.dt_weight + warp; }
  __device__ __forceinline__ R* tables() const { return memory.table + warp * p.plan.table; }
  __device__ __forceinline__ R* plane(int kind) const {
    return memory.plane + (int64_t(kind) * p.plan.channels + warp) * p.plan.pitch;
  }
};

// Says where the block goes; before, what it was at has been read.
__device__ __forceinline__ void begin_block_route(const Inputs& p, Now& now, int64_t task,
                                                  int64_t route) {
  __syncthreads();  // what belongs to the route before has been read
  if (threadIdx.x == 0) now.task = task_at(p, task), now.route = route;
  __syncthreads();  // task and route are known
}

// Where step t is in a row of a tile: the four or eight of a lane in packs of 16 bytes, such that those
// of all lanes lie side by side.
template <class C>
__device__ __forceinline__ int in_row(int t) {
  return C::kItems == 8 ? (t & 4) * 32 + (t >> 3) * 4 + (t & 3) : t;
}
template <class C, class F>
__device__ __forceinline__ void for_packs_of_row(int lane, F&& f) {
  constexpr int kPack = C::kItems == 8 ? 4 : C::kItems;
#pragma unroll
  for (int i = 0; i < C::kItems; i += kPack)
    f(std::integral_constant<int, kPack>{}, i, i * 32 + lane * kPack);
}
template <class C, class E>
__device__ __forceinline__ void load_items(E* row, int lane, E (&x)[C::kItems]) {
  for_packs_of_row<C>(lane, [&](auto pack, int i, int at) {
    const auto v = several<decltype(pack)::value>(row[at]);
#pragma unroll
    for (int j = 0; j < decltype(pack)::value; ++j) x[i + j] = v.x[j];
  });
}
template <class C>
__device__ __forceinline__ void store_items(typename C::R* row, int lane,
                                            const typename C::Items& x) {
  for_packs_of_row<C>(lane, [&](auto pack, int i, int at) {
    auto& v = several<decltype(pack)::value>(row[at]);
#pragma unroll
    for (int j = 0; j < decltype(pack)::value; ++j) v.x[j] = x[i + j];
  });
}

// `place`: the tile's.
template <class C>
__device__ __forceinline__ void load_places(const Inputs& p, const int32_t* place, int lane,
                                            int (&at)[C::kItems]) {
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) at[j] = kSkip;
  if (!C::kFast && lane * C::kItems >= p.chunk) return;
  if constexpr (C::kItems == 8) {
    route_gather::cuda::load_entries<8>(place + lane * 8, at);
  } else {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) at[j] = __ldg(place + lane * C::kItems + j);
  }
}

// Bits of the lane's steps before which the state starts anew.
template <class C>
__device__ __forceinline__ unsigned find_starts(const Inputs& p, const Tile& tile, int lane) {
  unsigned starts = 0;
  if (C::kFast || !(tile.flags & kResets)) return starts;
  const int64_t first = tile.begin + lane * C::kItems;
  int64_t phase = first % p.reset_period;
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    if (phase == 0 && first + j > 0 && lane * C::kItems + j < tile.steps) starts |= 1u << j;
    phase = phase + 1 == p.reset_period ? 0 : phase + 1;
  }
  return starts;
}

}  // namespace statescan::selective_scan_2d::cuda
