// Backward of the selective scan on the GPU. Blocks are those of the forward and go through their
// tiles from the last to the first, each from the state that the forward saved for it.
//
//   <- tile   | step sizes, gates | walk; fetch the next tile | dB, dC of the block | du .. |
//
// dB and dC are summed over the channels of the block and written once for each of its tiles; sums
// over blocks, batch and parts follow in a fixed order (states.cu). Nothing is atomic: the same call
// gives the same bits.
//
// Grid over (part of a sequence, batch, group, block of channels), block C::kThreads.
#include "common/launch.h"
#include "selective_scan/walk_back.cuh"

namespace statescan::selective_scan::cuda {
namespace {

// The state before the tile that was fetched.
template <class C>
__device__ __forceinline__ void read_entry(const BwdParams& p, BwdShared<C>& shared, Kept<C>& h) {
  const Lane<C> lane;
  const auto* from = reinterpret_cast<const typename C::R*>(
      &shared.fetched.pack[Fetched<C, true>::begin(p, kFetchEntry)]);
  const bool along_rows = p.chunk_access == Access::kAlongRows;
#pragma unroll
  for (int i = 0; i < C::kKept; ++i) {
    const int c = lane.channel + i / C::kS, n = lane.q * C::kS + i % C::kS;
    h[i / C::kS][i % C::kS] = from[along_rows ? n * C::kChannels + c : c * C::kStates + n];
  }
}

// Step sizes, dy before the gate, dz / y, D u.
template <class C>
__device__ __forceinline__ void prepare(const BwdParams& p, const Column<C>& column,
                                        const TileInfo& info, BwdShared<C>& shared) {
  using R = typename C::R;
  ColumnSums<C>& sums = shared.sums[int(threadIdx.x)];
  column.for_runs(shared.task, info, [&](int t, unsigned inside) {
    R u[C::kRun], dy[C::kRun] = {}, delta[C::kRun];
    read_run(p, kU, shared.fetched, column.c, t, u);
    if (p.over[kDy]) read_run(p, kDy, shared.fetched, column.c, t, dy);
    if (p.over[kZ]) {
      R z[C::kRun];
      read_run(p, kZ, shared.fetched, column.c, t, z);
#pragma unroll
      for (int j = 0; j < C::kRun; ++j) {
        const int at = column.at(p, t + j);
        const R gate = sigmoid(z[j]);
        shared.gate[at] = dy[j] * silu_slope(z[j], gate);
        shared.y[at] = inside >> j & 1 ? sums.D * u[j] : R(0);
        dy[j] *= z[j] * gate;
      }
    }
    read_run(p, kDelta, shared.fetched, column.c, t, delta);
    R slope[C::kRun], dD = 0;
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) {
      delta[j] = step_size(delta[j], sums.bias, p.delta_softplus, slope[j]);
    }
    if (inside != all_of<C::kRun>()) {
#pragma unroll
      for (int j = 0; j < C::kRun; ++j) {
        if (!(inside >> j & 1)) delta[j] = slope[j] = u[j] = dy[j] = 0;
      }
    }
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) {
      const int at = column.at(p, t + j);
      dD += dy[j] * u[j];
      shared.tile[kDeltaTile][at] = delta[j];
      shared.tile[kDeltaUTile][at] = delta[j] * u[j];
      shared.tile[kDyTile][at] = dy[j];
      shared.tile[kUTile][at] = u[j];
      shared.tile[kSlopeTile][at] = slope[j];
    }
    sums.dD += dD;
  });
}

// du, ddelta and dz.
template <class C>
__device__ __forceinline__ void store_gradients(const BwdParams& p, const Column<C>& column,
                                                const TileInfo& info, BwdShared<C>& shared) {
  using R = typename C::R;
  ColumnSums<C>& sums = shared.sums[int(threadIdx.x)];
  auto store = [&](int i, int t, const R(&v)[C::kRun]) {
    store_run<C>(p.gradient[i], p.gradient_access[i] == Access::kAlongTime, shared.task, info.span,
                 column.c, t, v);
  };
  column.for_runs(shared.task, info, [&](int t, unsigned inside) {
    R ddelta[C::kRun], du[C::kRun], dbias = 0;
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) {
      const int at = column.at(p, t + j);
      const R d_delta_u = shared.tile[kDDeltaUTile][at];
      ddelta[j] = (shared.tile[kDDeltaTile][at] * R(kLn2) + shared.tile[kUTile][at] * d_delta_u) *
                  shared.tile[kSlopeTile][at];
      du[j] = sums.D * shared.tile[kDyTile][at] + shared.tile[kDeltaTile][at] * d_delta_u;
      dbias += ddelta[j];
    }
    sums.dbias += dbias;
    store(0, t, ddelta);
    store(1, t, du);
    if (!p.over[kZ]) return;
    R dz[C::kRun];
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) {
      const int at = column.at(p, t + j);
      dz[j] = inside >> j & 1 ? shared.gate[at] * shared.y[at] : R(0);
    }
    store(2, t, dz);
  });
}

// dB and dC of a tile, summed over the warps of the block in their order.
template <class C>
__device__ __forceinline__ void write_projection_sums(const BwdParams& p, const Task& task,
                                                      const Span& span, int first,
                                                      BwdShared<C>& shared) {
  using R = typename C::R;
  const bool whole = p.state % 4 == 0;
  const int64_t line = ((task.block * p.batch + task.b) * p.groups + task.group) * p.seqlen;
#pragma unroll 1
  for (int i = int(threadIdx.x) * C::kS; i < kSteps * 2 * C::kStates; i += C::kThreads * C::kS) {
    const int n = first + i % C::kStates, which = i / C::kStates % 2, step = i / (2 * C::kStates);
    const int row = in_scan(p, step);
    if (row >= span.steps || n >= p.state || (C::kAny && is_constant(p, which))) continue;
    auto sum = several<C::kS>(shared.checkpoint[shared.result_at(0) + i]);
#pragma unroll
    for (int warp = 1; warp < C::kWarps; ++warp) {
      const auto v = several<C::kS>(shared.checkpoint[shared.result_at(warp) + i]);
#pragma unroll
      for (int s = 0; s < C::kS; ++s) sum.x[s] += v.x[s];
    }
    R* out = static_cast<R*>(p.sums[which]) + (line + span.begin + row) * p.state + n;
    if constexpr (C::kS == 4 && sizeof(R) == 4) {
      if (whole) {
        Pack<float, 4>::of(sum.x).store(out);
        continue;
      }
    }
#pragma unroll
    for (int s = 0; s < C::kS; ++s) {
      if (n + s < p.state) out[s] = sum.x[s];
    }
  }
}

// The sums over time of a part.
template <class C>
__device__ __forceinline__ void write_column_sums(const BwdParams& p, const Task& task,
                                                  const Column<C>& column, BwdShared<C>& shared) {
  using R = typename C::R;
  __syncthreads();  // every thread's sums are complete
  if (column.t0 == 0 && column.c < task.channels) {
    R dD = 0, dbias = 0;
#pragma unroll
    for (int i = 0; i < Column<C>::kShares; ++i) {
      dD += shared.sums[int(threadIdx.x) + i].dD;
      dbias += shared.sums[int(threadIdx.x) + i].dbias;
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

// What to fetch for a tile, or for another block of its states.
__device__ __forceinline__ unsigned fetch_bits(const BwdParams& p, bool operands) {
  unsigned bits = projection_bits(p) | 1u << kFetchEntry;
#pragma unroll
  for (int x = 0; x < 4; ++x) bits |= operands && p.over[x] ? 1u << x : 0u;
  return bits;
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
    find_sources(p, task, shared.fetched.source);
    if (threadIdx.x == 0) {
      const R* states = state_row<C>(p.chunk_states, p, task.b * p.tiles()) + task.channel;
      shared.fetched.source[kFetchEntry] = {reinterpret_cast<const char*>(states),
                                            int64_t(sizeof(R)),
                                            p.dim * int64_t(sizeof(R)),
                                            0,
                                            1,
                                            log2_bytes(p.compute),
                                            p.chunk_access};
    }
    __syncthreads();  // sources are known
    ColumnSums<C>& sums = shared.sums[int(threadIdx.x)];
    sums = {column.template parameter<R>(p.delta_bias, task, p.delta_repeat),
            column.template parameter<R>(p.D, task)};
    Parameters<C> k;
    Gradients<C> g;
    if (state_blocks == 1) {
      k.load(p, task, 0);
      begin_states<C>(p, task, 0, g);
    }
    fetch(p, task, span_at(p, p.tiles(), task.end - 1), 0, fetch_bits(p, true), shared.fetched);
    ptx::cp_async_commit();
#pragma unroll 1
    for (int64_t tile = task.end - 1; tile >= task.first; --tile) {
      TileInfo& info = shared.info[int(tile & 1)];
      const bool marked = begin_tile(p, task, tile, info);
      prepare<C>(p, column, info, shared);
#pragma unroll 1
      for (int block = 0; block < state_blocks; ++block) {
        const int first = block * C::kStates;
        if (block > 0) {
          ptx::cp_async_wait<0>();
          __syncthreads();  // its operands have come, the block of states before is done with
        }
        stage_projections(p, projection_bits(p), info.inside, shared.fetched, shared.projection);
        Kept<C> h;
        read_entry<C>(p, shared, h);
        __syncthreads();  // the tile is in place, what was fetched has been read
        const bool next_block = block + 1 < state_blocks;
        if (next_block || tile > task.first) {
          fetch(p, task, span_at(p, p.tiles(), next_block ? tile : tile - 1),
                next_block ? first + C::kStates : 0, fetch_bits(p, !next_block), shared.fetched);
        }
        ptx::cp_async_commit();
        if (state_blocks > 1) {
          k.load(p, task, first);
          if (tile == task.end - 1) {
            begin_states<C>(p, task, first, g);
          } else {
            for_kept<C>(p, i, state_blocks, block, g,
                        [](const R* from, Kept<C>& x) { load_kept<C>(from, x); });
          }
        }
        with_marked<C>(marked, [&](auto look) {
          const Steps<C, decltype(look)::value> steps{p,
                                                      task,
                                                      first,
                                                      info,
                                                      shared.tile[kDeltaTile],
                                                      shared.tile[kDeltaUTile],
                                                      shared.projection};
          walk_back<C>(steps, k, h, p.dinitial, shared, g);
        });
        __syncthreads();  // every warp has walked the tile
        write_projection_sums<C>(p, task, info.span, first, shared);
        if (tile == task.first) end_states<C>(p, task, first, g);
        if (state_blocks > 1) {
          for_kept<C>(p, i, state_blocks, block, g,
                      [](R* to, const Kept<C>& x) { store_kept<C>(to, x); });
        }
      }
      store_gradients<C>(p, column, info, shared);
    }
    write_column_sums<C>(p, task, column, shared);
  }
}

}  // namespace

void bwd(BwdParams p, Layout layout, cudaStream_t stream) {
  find_access(p);
  const View<3> chunk_states{const_cast<void*>(p.chunk_states), p.compute, {p.dim, 1, p.dim}};
  p.chunk_access = access_of(chunk_states, p, 1);
  for (int i = 0; i < 3; ++i) p.gradient_access[i] = access_of(p.gradient[i], p, 1);
  find_marks(p, stream);
  if (p.batch * p.dim * p.seqlen == 0) return;
  if (p.parts > 1) find_carries(p, layout, true, stream);
  with_layout<WideBack>(layout, p.compute, [&](auto config) {
    using C = decltype(config);
    const int64_t blocks = (p.group_dim() + C::kChannels - 1) / C::kChannels;
    const int64_t tasks = p.parts * p.batch * p.groups * blocks;
    launch("selective_scan bwd", bwd_kernel<C>, blocks_for(tasks, 1), C::kThreads,
           shared_bytes<BwdShared<C>>(p), stream, p, int((p.state + C::kStates - 1) / C::kStates),
           tasks);
  });
}

}  // namespace statescan::selective_scan::cuda
