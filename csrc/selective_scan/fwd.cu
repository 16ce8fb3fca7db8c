// Forward of the selective scan on the GPU: time is serial, states stay in registers, B and C are
// shared by the channels of a block through shared memory.
//
//   tile ->   | step sizes, D u, silu(z) | walk 16 steps; fetch the next tile | store y | ..
//
// Grid over (part of a sequence, batch, group, block of channels), block C::kThreads. With more
// states than a block of them, the tile is walked once for each block of states, and h waits in
// global memory.
#include "common/launch.h"
#include "selective_scan/walk.cuh"

namespace statescan::selective_scan::cuda {
namespace {

enum { kDeltaTile, kDeltaUTile, kYTile, kFwdTiles };

template <class C>
struct FwdShared {
  alignas(32) SharedArray<Tile<C>, kFwdTiles> tile;
  alignas(32) SharedArray<StateTile<C>, 2> projection;
  SharedArray<TileInfo, 2> info;
  Task task;  // here rather than in registers
  Fetched<C, false> fetched;
  Tile<C> gate;  // silu(z)
};

// Step sizes, D u and silu(z).
template <class C>
__device__ __forceinline__ void prepare(const FwdParams& p, const Column<C>& column,
                                        const TileInfo& info, typename C::R bias, typename C::R D,
                                        FwdShared<C>& shared) {
  using R = typename C::R;
  column.for_runs(shared.task, info, [&](int t, unsigned inside) {
    R delta[C::kRun], u[C::kRun];
    read_run(p, kDelta, shared.fetched, column.c, t, delta);
    read_run(p, kU, shared.fetched, column.c, t, u);
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) delta[j] = step_size(delta[j], bias, p.delta_softplus);
    if (inside != all_of<C::kRun>()) {
#pragma unroll
      for (int j = 0; j < C::kRun; ++j) {
        if (!(inside >> j & 1)) delta[j] = u[j] = 0;
      }
    }
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) {
      const int at = column.at(p, t + j);
      shared.tile[kDeltaTile][at] = delta[j];
      shared.tile[kDeltaUTile][at] = delta[j] * u[j];
      shared.tile[kYTile][at] = D * u[j];
    }
    if (!p.over[kZ]) return;
    R z[C::kRun];
    read_run(p, kZ, shared.fetched, column.c, t, z);
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) {
      shared.gate[column.at(p, t + j)] = inside >> j & 1 ? silu(z[j]) : R(0);
    }
  });
}

template <class C>
__device__ __forceinline__ void store_outputs(const FwdParams& p, const Column<C>& column,
                                              const TileInfo& info, FwdShared<C>& shared) {
  using R = typename C::R;
  column.for_runs(shared.task, info, [&](int t, unsigned inside) {
    R y[C::kRun];
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) {
      const int at = column.at(p, t + j);
      y[j] = shared.tile[kYTile][at];
      if (p.over[kZ]) y[j] *= shared.gate[at];
      if (C::kAny && !(inside >> j & 1)) y[j] = 0;  // a constant C
    }
    store_run<C>(p.y, p.y_access == Access::kAlongTime, shared.task, info.span, column.c, t, y);
  });
}

// Last states, and all states.
template <class C>
__device__ __forceinline__ void emit_states(const FwdParams& p, const Task& task, TileInfo& info,
                                            int first, int step, const Kept<C>& h) {
  using R = typename C::R;
  const int64_t size = p.dim * p.state;
  if (info.mark[step] & kToSlot) {
    store_states<C>(static_cast<R*>(p.last) + info.slot[step] * size, false, p, task, first, h);
  }
  if constexpr (C::kAny) {
    const int row = in_scan(p, step);
    if (p.states == nullptr || row >= info.span.steps) return;
    const bool padding = info.mark[step] & kPadding;
    const int64_t t = task.b * p.seqlen + info.span.begin + row;
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
  const unsigned state_bits = projection_bits(p);
  const unsigned bits = state_bits | 1u << kU | 1u << kDelta | (p.over[kZ] ? 1u << kZ : 0u);
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    __syncthreads();  // the task before is done with
    if (threadIdx.x == 0) shared.task = task_at<C>(p, i);
    __syncthreads();  // the task is known
    const Task& task = shared.task;
    find_sources(p, task, shared.fetched.source);
    __syncthreads();  // sources are known
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
    fetch(p, task, span_at(p, p.tiles(), task.first), 0, bits, shared.fetched);
    ptx::cp_async_commit();
#pragma unroll 1
    for (int64_t tile = task.first; tile < task.end; ++tile) {
      TileInfo& info = shared.info[int(tile & 1)];
      const bool marked = begin_tile(p, task, tile, info);
      prepare<C>(p, column, info, bias, D, shared);
#pragma unroll 1
      for (int block = 0; block < state_blocks; ++block) {
        const int first = block * C::kStates;
        R* kept = state_blocks == 1 ? nullptr : kept_at<C>(p.kept[0], i, state_blocks, block);
        if (block > 0) {
          ptx::cp_async_wait<0>();
          __syncthreads();  // B and C have come, the block of states before has been walked
        }
        stage_projections(p, bits, info.inside, shared.fetched, shared.projection);
        __syncthreads();  // the tile is in place, what was fetched has been read
        const bool next_block = block + 1 < state_blocks;
        if (next_block || tile + 1 < task.end) {
          fetch(p, task, span_at(p, p.tiles(), next_block ? tile : tile + 1),
                next_block ? first + C::kStates : 0, next_block ? state_bits : bits,
                shared.fetched);
        }
        ptx::cp_async_commit();
        if (kept != nullptr) {
          k.load(p, task, first);
          tile == task.first ? entry(first) : load_kept<C>(kept, h);
        }
        if (p.chunk_states != nullptr) {
          store_states<C>(state_row<C>(p.chunk_states, p, task.b * p.tiles() + info.span.tile),
                          true, p, task, first, h);
        }
        with_marked<C>(marked, [&](auto look) {
          constexpr bool kMarked = decltype(look)::value;
          const Steps<C, kMarked> steps{p,
                                        task,
                                        first,
                                        info,
                                        shared.tile[kDeltaTile],
                                        shared.tile[kDeltaUTile],
                                        shared.projection};
          walk<C, true>(steps, k, h, shared.tile[kYTile], 0, kSteps,
                        [&](int step, const Kept<C>& h) {
                          if (kMarked) emit_states<C>(p, task, info, first, step, h);
                        });
        });
        if (kept != nullptr) store_kept<C>(kept, h);
        if (tile + 1 == task.end) exit(first);
      }
      __syncthreads();  // y is complete
      store_outputs<C>(p, column, info, shared);
    }
  }
}

}  // namespace

void fwd(FwdParams p, Layout layout, cudaStream_t stream) {
  find_access(p);
  p.y_access = access_of(p.y, p, 1);
  find_marks(p, stream);
  if (p.batch * p.dim * p.seqlen == 0) return;
  if (p.parts > 1) find_carries(p, layout, false, stream);
  with_layout<Wide>(layout, p.compute, [&](auto config) {
    using C = decltype(config);
    const int64_t blocks = (p.group_dim() + C::kChannels - 1) / C::kChannels;
    const int64_t tasks = p.parts * p.batch * p.groups * blocks;
    launch("selective_scan fwd", fwd_kernel<C>, blocks_for(tasks, 1), C::kThreads,
           shared_bytes<FwdShared<C>>(p), stream, p, int((p.state + C::kStates - 1) / C::kStates),
           tasks);
  });
}

}  // namespace statescan::selective_scan::cuda
