// Backward of the selective scan on the GPU. Blocks are those of the forward and go through their
// tiles from the last to the first, each from the state that the forward saved for it.
//
//   <- tile   | stage u, delta, z, dy, B, C | dy before the gate | walk | dB, dC of the block | du .. |
//
// dB and dC are summed over the channels of the block and written once for each of its tiles; sums
// over blocks, batch and parts follow in a fixed order (states.cu). Nothing is atomic: the same call
// gives the same bits.
//
// Grid over (part of a sequence, batch, group, block of channels), block 128.
#include "common/launch.h"
#include "selective_scan/walk_back.cuh"

namespace statescan::selective_scan::cuda {
namespace {

template <class C>
__device__ __forceinline__ void stage_projections(const Inputs& p, const Task& task,
                                                  const Span& span, int first,
                                                  BwdShared<C>& shared) {
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (C::kAny && (i == 0 ? p.constant_B : p.constant_C)) continue;
    load_states_tile<C>(p, p.projection[i], task, span, first, shared.projection[i]);
  }
}

// Step sizes, dy before the gate, dz / y, D u in place; sums over states at zero.
template <class C>
__device__ __forceinline__ void prepare(const BwdParams& p, const Task& task, const Span& span,
                                        const Column<C>& column, const ColumnSums<C>& sums,
                                        BwdShared<C>& shared) {
  using R = typename C::R;
#pragma unroll 4
  for (int t = column.t0; t < kSteps; t += Column<C>::kStride) {
    const int i = t * C::kPitch + column.c;
    const bool inside =
        t < span.steps && column.c < task.channels && !(shared.marks.mark[t] & kPadding);
    R delta = 0, u = 0, dy = 0;
    if (inside) {
      delta = step_size(shared.tile[kDelta][i], sums.bias, p.delta_softplus);
      u = shared.tile[kU][i];
      if (p.over[kDy]) dy = shared.tile[kDy][i];
    }
    if (p.over[kZ]) {
      const R z = inside ? shared.tile[kZ][i] : R(0), gate = sigmoid(z);
      shared.tile[kZ][i] = dy * silu_slope(z, gate);
      shared.tile[kY][i] = sums.D * u;
      dy *= z * gate;
    }
    shared.tile[kDelta][i] = delta;
    shared.tile[kU][i] = u;
    shared.tile[kDy][i] = dy;
    shared.tile[kDDelta][i] = shared.tile[kDDeltaU][i] = 0;
  }
}

// du, ddelta and dz in the tiles of their parts.
template <class C>
__device__ __forceinline__ void combine(const BwdParams& p, const Task& task, const Span& span,
                                        const Column<C>& column, ColumnSums<C>& sums,
                                        BwdShared<C>& shared) {
  using R = typename C::R;
#pragma unroll 4
  for (int t = column.t0; t < kSteps; t += Column<C>::kStride) {
    const int i = t * C::kPitch + column.c;
    const bool inside =
        t < span.steps && column.c < task.channels && !(shared.marks.mark[t] & kPadding);
    const R delta = shared.tile[kDelta][i], u = shared.tile[kU][i], dy = shared.tile[kDy][i];
    const R d_delta_u = shared.tile[kDDeltaU][i];
    R ddelta = shared.tile[kDDelta][i] * R(kLn2) + u * d_delta_u;
    if (p.delta_softplus) ddelta *= softplus_slope(delta);
    ddelta = inside ? ddelta : R(0);
    sums.dD += dy * u;
    sums.dbias += ddelta;
    shared.tile[kDDelta][i] = ddelta;
    shared.tile[kDDeltaU][i] = inside ? sums.D * dy + delta * d_delta_u : R(0);
    if (p.over[kZ]) shared.tile[kZ][i] = inside ? shared.tile[kZ][i] * shared.tile[kY][i] : R(0);
  }
}

// dB and dC of a tile, summed over the warps of the block in their order.
template <class C>
__device__ __forceinline__ void write_projection_sums(const BwdParams& p, const Task& task,
                                                      const Span& span, int first,
                                                      BwdShared<C>& shared) {
  using R = typename C::R;
  using S = BwdShared<C>;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kSteps * 2 * C::kStates; i += C::kThreads) {
    const int n = i % C::kStates, which = i / C::kStates % 2, step = i / (2 * C::kStates);
    const int row = p.reverse ? kSteps - 1 - step : step,
              in_piece = i - step / S::kHeld * S::kHeld * 2 * C::kStates;
    if (row >= span.steps || first + n >= p.state) continue;
    if (C::kAny && (which == 0 ? p.constant_B : p.constant_C)) continue;
    R sum = 0;
#pragma unroll
    for (int warp = 0; warp < C::kWarps; ++warp) {
      sum += shared.checkpoint[shared.checkpoint_at(warp, step / S::kHeld) + in_piece];
    }
    const int64_t at =
        ((task.block * p.batch + task.b) * p.groups + task.group) * p.seqlen + span.begin + row;
    static_cast<R*>(p.sums[which])[at * p.state + first + n] = sum;
  }
}

// The sums over time of a part.
template <class C>
__device__ __forceinline__ void write_column_sums(const BwdParams& p, const Task& task,
                                                  const Column<C>& column, BwdShared<C>& shared) {
  using R = typename C::R;
  __syncthreads();  // every thread's sums are complete
  if (threadIdx.x < C::kChannels && column.c < task.channels) {
    R dD = 0, dbias = 0;
#pragma unroll
    for (int i = 0; i < Column<C>::kStride; ++i) {
      dD += shared.sums[i * C::kChannels + column.c].dD;
      dbias += shared.sums[i * C::kChannels + column.c].dbias;
    }
    const int64_t at = (task.part * p.batch + task.b) * p.dim + task.channel + column.c;
    static_cast<R*>(p.dD)[at] = dD;
    static_cast<R*>(p.dbias)[at] = dbias;
  }
  __syncthreads();  // the sums have been read, and nobody needs the task any more
}

// A block of states of one part: before its last tile and after its first.
template <class C>
__device__ __forceinline__ void begin_states(const BwdParams& p, const Task& task, int first,
                                             Gradients<C>& g) {
  using R = typename C::R;
  g = {};
  const R* row = p.carry != nullptr ? state_row<C>(p.carry, p, task.part * p.batch + task.b)
                 : p.marks == nullptr && p.dlast != nullptr
                     ? static_cast<const R*>(p.dlast) + task.b * p.dim * p.state
                     : nullptr;
  load_states<C>(row, p.carry != nullptr, p, task, first, g.dh);
}
template <class C>
__device__ __forceinline__ void end_states(const BwdParams& p, const Task& task, int first,
                                           const Gradients<C>& g) {
  using R = typename C::R;
  if (p.marks == nullptr && p.dinitial != nullptr && task.part == 0) {
    store_states<C>(static_cast<R*>(p.dinitial) + task.b * p.dim * p.state, false, p, task, first,
                    g.dh);
  }
  const int64_t row = (task.part * p.batch + task.b) * p.dim * p.state;
  store_states<C>(static_cast<R*>(p.dA) + row, false, p, task, first, g.dA);
  if constexpr (C::kAny) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 0 ? p.constant_B : p.constant_C) {
        store_states<C>(static_cast<R*>(p.sums[i]) + row, false, p, task, first, g.dfixed[i]);
      }
    }
  }
}

// Moves what a lane carries to or from global memory.
template <class C, class F>
__device__ __forceinline__ void for_kept(const BwdParams& p, int64_t task, int64_t blocks,
                                         int64_t block, Gradients<C>& g, F&& f) {
  f(kept_at<C>(p.kept[0], task, blocks, block), g.dh);
  f(kept_at<C>(p.kept[1], task, blocks, block), g.dA);
  if constexpr (C::kAny) {
    f(kept_at<C>(p.kept[2], task, blocks, block), g.dfixed[0]);
    f(kept_at<C>(p.kept[3], task, blocks, block), g.dfixed[1]);
  }
}

template <class C>
__global__ __launch_bounds__(C::kThreads, C::kBwdBlocks) void bwd_kernel(const BwdParams p,
                                                                         int state_blocks,
                                                                         int64_t tasks) {
  using R = typename C::R;
  BwdShared<C>& shared = *dynamic_shared<BwdShared<C>>();
  const Column<C> column;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    if (threadIdx.x == 0) shared.task = task_at<C>(p, i);
    __syncthreads();  // the task is known
    const Task& task = shared.task;
    ColumnSums<C>& sums = shared.sums[int(threadIdx.x)];
    sums = {column.template parameter<R>(p.delta_bias, task, p.delta_repeat),
            column.template parameter<R>(p.D, task)};
    Parameters<C> k;
    Gradients<C> g;
    if (state_blocks == 1) {
      k.load(p, task, 0);
      begin_states<C>(p, task, 0, g);
    }
#pragma unroll 1
    for (int64_t tile = task.end - 1; tile >= task.first; --tile) {
      __syncthreads();  // the tile before has been stored
      if (threadIdx.x == 0) shared.span = span_at(p, p.tiles(), tile);
      __syncthreads();  // the tile is known
      const Span& span = shared.span;
#pragma unroll 1
      for (int x = 0; x < 4; ++x) {
        if (!p.over[x]) continue;
        load_tile<C>(p.over[x], x == kDelta ? p.delta_repeat : 1, task, span, shared.tile[x]);
      }
      stage_projections(p, task, span, 0, shared);
      const bool marked = sync_with_marks(p, task, span, shared.marks);
      prepare<C>(p, task, span, column, sums, shared);
      __syncthreads();  // step sizes are in place
#pragma unroll 1
      for (int block = 0; block < state_blocks; ++block) {
        const int first = block * C::kStates;
        if (block > 0) {
          __syncthreads();  // the block of states before is done with
          stage_projections(p, task, span, first, shared);
          __syncthreads();  // B and C are in place
        }
        if (state_blocks > 1) {
          k.load(p, task, first);
          if (tile == task.end - 1) {
            begin_states<C>(p, task, first, g);
          } else {
            for_kept<C>(p, i, state_blocks, block, g,
                        [](const R* from, Kept<C>& x) { load_kept<C>(from, x); });
          }
        }
        Kept<C> h;
        load_states<C>(state_row<C>(p.chunk_states, p, task.b * p.tiles() + span.tile), true, p,
                       task, first, h);
        with_marked<C>(marked, [&](auto look) {
          const Steps<C, decltype(look)::value> steps{p,
                                                      task,
                                                      span,
                                                      first,
                                                      shared.marks,
                                                      shared.tile[kU],
                                                      shared.tile[kDelta],
                                                      shared.projection};
          walk_back<C>(steps, k, h, p.dinitial, shared, g);
        });
        __syncthreads();  // every warp has walked the tile
        write_projection_sums<C>(p, task, span, first, shared);
        if (tile == task.first) end_states<C>(p, task, first, g);
        if (state_blocks > 1) {
          for_kept<C>(p, i, state_blocks, block, g,
                      [](R* to, const Kept<C>& x) { store_kept<C>(to, x); });
        }
      }
      combine<C>(p, task, span, column, sums, shared);
      __syncthreads();  // the gradients are in place
#pragma unroll 1
      for (int x = 0; x < (p.over[kZ] ? 3 : 2); ++x) {
        Tile<C>& from = shared.tile[x == 2 ? int(kZ) : kDDelta + x];
        store_tile<C>(p.gradient[x], task, span, [&](int, int at) { return from[at]; });
      }
    }
    write_column_sums<C>(p, task, column, shared);
  }
}

}  // namespace

void bwd(const BwdParams& p, Layout layout, cudaStream_t stream) {
  find_marks(p, stream);
  if (p.batch * p.dim * p.seqlen == 0) return;
  if (p.parts > 1) find_carries(p, layout, true, stream);
  with_layout(layout, p.compute, [&](auto config) {
    using C = decltype(config);
    const int64_t blocks = (p.group_dim() + C::kChannels - 1) / C::kChannels;
    const int64_t tasks = p.parts * p.batch * p.groups * blocks;
    launch("selective_scan bwd", bwd_kernel<C>, blocks_for(tasks, 1), C::kThreads,
           sizeof(BwdShared<C>), stream, p, int((p.state + C::kStates - 1) / C::kStates), tasks);
  });
}

}  // namespace statescan::selective_scan::cuda
