// Forward of the selective scan on the GPU: time is serial, states stay in registers, B and C are
// shared by the channels of a block through shared memory.
//
//   tile ->   | stage u, delta, z, B, C | step sizes, D u, silu(z) | walk 16 steps | store y | ..
//             channels across the block; states across the 4 lanes that share a channel
//
// Grid over (part of a sequence, batch, group, block of channels), block 128. With more states than
// a block of them, the tile is walked once for each block of states, and h waits in global memory.
#include "common/launch.h"
#include "selective_scan/walk.cuh"

namespace statescan::selective_scan::cuda {
namespace {

template <class C>
struct FwdShared {
  alignas(32) SharedArray<Tile<C>, 4> tile;  // by Over; y last
  alignas(32) SharedArray<StateTile<C>, 2> projection;
  Marks marks;
  Task task;  // here rather than in registers
  Span span;
};
constexpr int kY = 3;

template <class C>
__device__ __forceinline__ void stage_projections(const Inputs& p, const Task& task,
                                                  const Span& span, int first,
                                                  FwdShared<C>& shared) {
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (C::kAny && (i == 0 ? p.constant_B : p.constant_C)) continue;
    load_states_tile<C>(p, p.projection[i], task, span, first, shared.projection[i]);
  }
}

// Step sizes, D u and silu(z) in place.
template <class C>
__device__ __forceinline__ void prepare(const FwdParams& p, const Task& task, const Span& span,
                                        const Column<C>& column, typename C::R bias,
                                        typename C::R D, FwdShared<C>& shared) {
  using R = typename C::R;
#pragma unroll
  for (int t = column.t0; t < kSteps; t += Column<C>::kStride) {
    const int i = t * C::kPitch + column.c;
    const bool inside =
        t < span.steps && column.c < task.channels && !(shared.marks.mark[t] & kPadding);
    R& delta = shared.tile[kDelta][i];
    R& u = shared.tile[kU][i];
    const R u_t = inside ? u : R(0);
    delta = inside ? step_size(delta, bias, p.delta_softplus) : R(0);
    u = u_t;
    shared.tile[kY][i] = D * u_t;
    if (p.over[kZ]) {
      R& z = shared.tile[kZ][i];
      z = inside ? silu(z) : R(0);
    }
  }
}

// Last states, and all states.
template <class C>
__device__ __forceinline__ void emit_states(const FwdParams& p, const Task& task, const Span& span,
                                            int first, int row, Marks& marks, const Kept<C>& h) {
  using R = typename C::R;
  const int64_t size = p.dim * p.state;
  if (marks.mark[row] & kToSlot) {
    store_states<C>(static_cast<R*>(p.last) + marks.slot[row] * size, false, p, task, first, h);
  }
  if constexpr (C::kAny) {
    if (p.states == nullptr || row >= span.steps) return;
    const bool padding = marks.mark[row] & kPadding;
    const int64_t t = task.b * p.seqlen + span.begin + row;
    for_states<C>(static_cast<R*>(p.states) + t * size, false, p, task, first,
                  [&](R* to, int c, int s) { *to = padding ? R(0) : h[c][s]; });
  }
}

template <class C>
__global__ __launch_bounds__(C::kThreads, C::kBlocks) void fwd_kernel(const FwdParams p,
                                                                      int state_blocks,
                                                                      int64_t tasks) {
  using R = typename C::R;
  FwdShared<C>& shared = *dynamic_shared<FwdShared<C>>();
  const Column<C> column;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    __syncthreads();  // the task before is done with
    if (threadIdx.x == 0) shared.task = task_at<C>(p, i);
    __syncthreads();  // the task is known
    const Task& task = shared.task;
    const R bias = column.template parameter<R>(p.delta_bias, task, p.delta_repeat);
    const R D = column.template parameter<R>(p.D, task);
    Parameters<C> k;
    Kept<C> h;
    auto entry = [&](int first) {  // the state before the part
      const R* row = p.carry != nullptr ? state_row<C>(p.carry, p, task.part * p.batch + task.b)
                     : p.marks == nullptr && p.initial != nullptr
                         ? static_cast<const R*>(p.initial) + task.b * p.dim * p.state
                         : nullptr;
      load_states<C>(row, p.carry != nullptr, p, task, first, h);
    };
    auto exit = [&](int first) {
      if (p.marks == nullptr && task.end == p.tiles()) {
        store_states<C>(static_cast<R*>(p.last) + task.b * p.dim * p.state, false, p, task, first,
                        h);
      }
    };
    if (state_blocks == 1) {
      k.load(p, task, 0);
      entry(0);
    }
#pragma unroll 1
    for (int64_t tile = task.first; tile < task.end; ++tile) {
      __syncthreads();  // the tile before has been stored
      if (threadIdx.x == 0) shared.span = span_at(p, p.tiles(), tile);
      __syncthreads();  // the tile is known
      const Span& span = shared.span;
#pragma unroll 1
      for (int x = 0; x < (p.over[kZ] ? 3 : 2); ++x) {
        load_tile<C>(p.over[x], x == kDelta ? p.delta_repeat : 1, task, span, shared.tile[x]);
      }
      stage_projections(p, task, span, 0, shared);
      const bool marked = sync_with_marks(p, task, span, shared.marks);
      prepare<C>(p, task, span, column, bias, D, shared);
      __syncthreads();  // step sizes are in place
#pragma unroll 1
      for (int block = 0; block < state_blocks; ++block) {
        const int first = block * C::kStates;
        R* kept = state_blocks == 1 ? nullptr : kept_at<C>(p.kept[0], i, state_blocks, block);
        if (block > 0) {
          __syncthreads();  // the block of states before has been walked
          stage_projections(p, task, span, first, shared);
          __syncthreads();  // B and C are in place
        }
        if (kept != nullptr) {
          k.load(p, task, first);
          tile == task.first ? entry(first) : load_kept<C>(kept, h);
        }
        if (p.chunk_states != nullptr) {
          store_states<C>(state_row<C>(p.chunk_states, p, task.b * p.tiles() + span.tile), true, p,
                          task, first, h);
        }
        with_marked<C>(marked, [&](auto look) {
          constexpr bool kMarked = decltype(look)::value;
          const Steps<C, kMarked> steps{p,
                                        task,
                                        span,
                                        first,
                                        shared.marks,
                                        shared.tile[kU],
                                        shared.tile[kDelta],
                                        shared.projection};
          walk<C, true>(steps, k, h, shared.tile[kY], 0, kSteps, [&](int row, const Kept<C>& h) {
            if (kMarked) emit_states<C>(p, task, span, first, row, shared.marks, h);
          });
        });
        if (kept != nullptr) store_kept<C>(kept, h);
        if (tile + 1 == task.end) exit(first);
      }
      __syncthreads();  // y is complete
      store_tile<C>(p.y, task, span, [&](int t, int at) {
        const R y = shared.tile[kY][at];
        if (C::kAny && shared.marks.mark[t] & kPadding) return R(0);  // a constant C
        return p.over[kZ] ? y * shared.tile[kZ][at] : y;
      });
    }
  }
}

}  // namespace

void fwd(const FwdParams& p, Layout layout, cudaStream_t stream) {
  find_marks(p, stream);
  if (p.batch * p.dim * p.seqlen == 0) return;
  if (p.parts > 1) find_carries(p, layout, false, stream);
  with_layout(layout, p.compute, [&](auto config) {
    using C = decltype(config);
    const int64_t blocks = (p.group_dim() + C::kChannels - 1) / C::kChannels;
    const int64_t tasks = p.parts * p.batch * p.groups * blocks;
    launch("selective_scan fwd", fwd_kernel<C>, blocks_for(tasks, 1), C::kThreads,
           sizeof(FwdShared<C>), stream, p, int((p.state + C::kStates - 1) / C::kStates), tasks);
  });
}

}  // namespace statescan::selective_scan::cuda
