// Backward: what the channels of a block add up.
#pragma once

#include "common/device_view.cuh"
#include "selective_scan_2d/tile.cuh"

namespace statescan::selective_scan_2d::cuda {

// What each warp's channel adds to dB and dC of a state, and its ddelta, (which, warp, step).
enum Share { kDB, kDC, kDDelta, kShares };
template <class C>
__device__ __forceinline__ typename C::R* share_of(const Memory<C>& memory, int which, int warp) {
  return memory.share + (which * kWarps + warp) * C::kSteps;
}

// ddelta of the block's channels as delta is given whole.
template <class C>
__device__ __forceinline__ void write_ddelta(const BwdParams& p, const Memory<C>& memory,
                                             const Tile& tile) {
  using R = typename C::R;
  const Task& task = memory.now.task;
  const View<4>& x = p.ddelta;
  const int64_t first = tile.b * x.stride[0] + tile.route * x.stride[1] +
                        task.channel * x.stride[2] + tile.begin * x.stride[3];
#pragma unroll 1
  for (int i = int(threadIdx.x); i < task.channels * C::kSteps; i += blockDim.x) {
    const int c = i / C::kSteps, t = i % C::kSteps;
    if (t >= tile.steps) continue;
    const int64_t at = first + c * x.stride[2] + t * x.stride[3];
    const R ddelta = share_of(memory, kDDelta, c)[in_row<C>(t)];
    if (p.delta_shared) {  // the routes add up, in their order
      R* sum = static_cast<R*>(x.data) + at;
      *sum = tile.route + 1 == p.routes ? ddelta : *sum + ddelta;
    } else {
      store_element(x.data, x.dtype, at, ddelta);
    }
  }
}

// ddt, summed over the channels of the block.
template <class C>
__device__ __forceinline__ void write_ddt(const BwdParams& p, const Memory<C>& memory,
                                          const Tile& tile, int64_t row) {
  using R = typename C::R;
  R* to = static_cast<R*>(p.ddt) + row * p.rank + tile.begin;
#pragma unroll 1
  for (int t = int(threadIdx.x); t < tile.steps; t += blockDim.x) {
    R ddelta[kWarps];
#pragma unroll
    for (int c = 0; c < kWarps; ++c) ddelta[c] = share_of(memory, kDDelta, c)[in_row<C>(t)];
#pragma unroll 2
    for (int r = 0; r < int(p.rank); ++r) {
      R sum = 0;
#pragma unroll
      for (int c = 0; c < kWarps; c += 4) {
        const auto w = several<4>(memory.dt_weight[r * kWarps + c]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += ddelta[c + j] * w.x[j];
      }
      to[r * p.steps + t] = sum;
    }
  }
}

// dB and dC of a state, summed over the channels of the block; after the last state that of delta, too.
template <class C>
__device__ __forceinline__ void write_sums(const BwdParams& p, const Memory<C>& memory,
                                           const Tile& tile, int64_t n) {
  using R = typename C::R;
  const int64_t row =
      ((memory.now.task.block * p.routes + tile.route) * p.batch + tile.b) * p.steps;
  R* to[2] = {static_cast<R*>(p.dB), static_cast<R*>(p.dC)};
#pragma unroll 1
  for (int t = int(threadIdx.x); t < tile.steps; t += blockDim.x) {
#pragma unroll
    for (int which = kDB; which <= kDC; ++which) {
      R sum = 0;
#pragma unroll
      for (int c = 0; c < kWarps; ++c) sum += share_of(memory, which, c)[in_row<C>(t)];
      to[which][(row + tile.begin + t) * p.state + n] = sum;
    }
  }
  if (n + 1 < p.state) return;
  p.rank == 0 ? write_ddelta(p, memory, tile) : write_ddt(p, memory, tile, row);
}

}  // namespace statescan::selective_scan_2d::cuda
