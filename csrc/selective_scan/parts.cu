// Where there are too few channels and batch elements to fill a GPU, a sequence is cut into parts that
// are walked at the same time. What enters each part is found in two passes: a walk of every part from
// zero, without outputs, and one along the parts.
//
//   forward    h after the part  = (product of its a) h before it + end of the walk from zero
//   backward   dh before the part = (product of its a) dh after it + end of the walk back from zero
//
// The product is one power of two, of A times the sum of the step sizes. Where a sequence starts in
// the part nothing passes through it: then the factor is -1, which no power is.
#include "common/divisor.h"
#include "common/launch.h"
#include "selective_scan/walk.cuh"

namespace statescan::selective_scan::cuda {
namespace {

enum { kDeltaTile, kInputTile, kPartTiles };  // kInputTile: delta u; backward: dy before the gate

template <class C, bool kBackward>
struct PartShared {
  using R = typename C::R;
  alignas(32) SharedArray<Tile<C>, kPartTiles> tile;
  alignas(32) SharedArray<StateTile<C>, 2> projection;  // B, or backward C
  Fetched<C, kBackward> fetched;
  SharedArray<TileInfo, 2> info;
};

// What to fetch for a tile.
template <bool kBackward>
__device__ __forceinline__ unsigned fetch_bits(const Inputs& p) {
  unsigned bits = 1u << kDelta | (projection_bits(p) & 1u << (kBackward ? kFetchC : kFetchB));
  if (!kBackward) return bits | 1u << kU;
  if (p.over[kDy]) bits |= 1u << kDy;
  return p.over[kZ] ? bits | 1u << kZ : bits;
}

template <class C, bool kBackward>
__device__ __forceinline__ void prepare(const Inputs& p, const Task& task, const Column<C>& column,
                                        const TileInfo& info, typename C::R bias,
                                        PartShared<C, kBackward>& shared) {
  using R = typename C::R;
  column.for_runs(task, info, [&](int t, unsigned inside) {
    const Over over = kBackward ? kDy : kU;
    R delta[C::kRun], x[C::kRun] = {};
    read_run(p, kDelta, shared.fetched, column.c, t, delta);
    if (p.over[over]) read_run(p, over, shared.fetched, column.c, t, x);
    if (kBackward && p.over[kZ]) {
      R z[C::kRun];
      read_run(p, kZ, shared.fetched, column.c, t, z);
#pragma unroll
      for (int j = 0; j < C::kRun; ++j) x[j] *= silu(z[j]);
    }
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) {
      const bool there = inside >> j & 1;
      const int at = column.at(p, t + j);
      const R step = step_size(delta[j], bias, p.delta_softplus), delta_t = there ? step : R(0);
      shared.tile[kDeltaTile][at] = delta_t;
      shared.tile[kInputTile][at] = !there ? R(0) : kBackward ? x[j] : delta_t * x[j];
    }
  });
}

// One block: one block of channels and of states of a part.
template <class C, bool kBackward>
__global__ __launch_bounds__(C::kThreads, C::kPartBlocks) void part_kernel(const Inputs p,
                                                                           int state_blocks,
                                                                           int64_t tasks) {
  using R = typename C::R;
  PartShared<C, kBackward>& shared = *dynamic_shared<PartShared<C, kBackward>>();
  const Lane<C> lane;
  const Column<C> column;
  const bool is_fixed = C::kAny && is_constant(p, kBackward);
  const unsigned bits = fetch_bits<kBackward>(p);
  const int64_t parts_tasks = tasks / state_blocks;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    // Nobody asks what leaves the last part (backward: the first).
    const Task task = task_at<C>(p, i % parts_tasks, kBackward ? 1 : 0);
    const int first = int(i / parts_tasks) * C::kStates;
    find_sources(p, task, shared.fetched.source);
    __syncthreads();  // sources are known
    const R bias = column.template parameter<R>(p.delta_bias, task, p.delta_repeat);
    Parameters<C> k;
    k.load(p, task, first);
    Kept<C> h{};
    R sum[C::kC] = {};
    bool reset = false;
    auto tile_at = [&](int64_t j) { return kBackward ? task.first + task.end - 1 - j : j; };
    auto fetch_tile = [&](int64_t j) {
      fetch(p, task, span_at(p, p.tiles(), tile_at(j)), first, bits, shared.fetched);
      ptx::cp_async_commit();
    };
    fetch_tile(task.first);
#pragma unroll 1
    for (int64_t j = task.first; j < task.end; ++j) {
      TileInfo& info = shared.info[int(j & 1)];
      const bool marked = begin_tile(p, task, tile_at(j), info);
      prepare<C, kBackward>(p, task, column, info, bias, shared);
      stage_projections(p, bits, info.inside, shared.fetched, shared.projection);
      __syncthreads();  // the tile is in place, what was fetched has been read
      if (j + 1 < task.end) fetch_tile(j + 1);
#pragma unroll 4
      for (int step = 0; step < kSteps; ++step) {
        const int row = kBackward ? kSteps - 1 - step : step;
        const int mark = marked ? int(info.mark[row]) : 0;
        if (!kBackward && mark & kStart) {
          load_start<C>(p, task, info, row, first, h);
          reset = true;
          for (int c = 0; c < C::kC; ++c) sum[c] = 0;
        }
        if (kBackward) {
          if (marked || C::kAny) add_state_gradients<C>(p, task, info, row, first, h);
        }
        const auto delta = several<C::kC>(shared.tile[kDeltaTile][row * C::kPitch + lane.channel]);
        const auto x = several<C::kC>(shared.tile[kInputTile][row * C::kPitch + lane.channel]);
        Several<R, C::kS> B{};
        if (!is_fixed) {
          B = several<C::kS>(shared.projection[kBackward][row * C::kStatePitch + lane.q * C::kS]);
        }
#pragma unroll
        for (int c = 0; c < C::kC; ++c) {
          sum[c] += delta.x[c];
#pragma unroll
          for (int s = 0; s < C::kS; ++s) {
            const R a = decay(delta.x[c], k.A[c][s]);
            const R B_t = k.projection(kBackward, B, c, s);
            h[c][s] =
                kBackward ? a * (h[c][s] + x.x[c] * B_t) : next_state(a, h[c][s], x.x[c], B_t);
          }
        }
        if (kBackward && mark & kStart) {
          reset = true;
          for (int c = 0; c < C::kC; ++c) {
            for (int s = 0; s < C::kS; ++s) h[c][s] = 0;
          }
        }
      }
    }
    __syncthreads();  // the last tile has been walked
    const int64_t at = task.part * p.batch + task.b;
    store_states<C>(state_row<C>(p.carry, p, at), true, p, task, first, h);
    Kept<C> factor;
#pragma unroll
    for (int c = 0; c < C::kC; ++c) {
#pragma unroll
      for (int s = 0; s < C::kS; ++s) factor[c][s] = reset ? R(-1) : decay(sum[c], k.A[c][s]);
    }
    store_states<C>(state_row<C>(p.factor, p, at), true, p, task, first, factor);
  }
}

// Thread: one number of the state of a batch element, along all parts. The end of each part's walk
// becomes what enters the part.
template <class R>
__global__ __launch_bounds__(128) void carry_kernel(const Inputs p, Divisor dim, Divisor state,
                                                    bool backward, int64_t tasks) {
  R* carry = static_cast<R*>(p.carry);
  const R* factor = static_cast<const R*>(p.factor);
  const R* begin = static_cast<const R*>(backward ? p.dlast : p.initial);
  for (int64_t i = int64_t(blockIdx.x) * 128 + threadIdx.x; i < tasks;
       i += int64_t(gridDim.x) * 128) {
    int64_t d, n;
    const int64_t b = state.divide(dim.divide(i, d), n);
    const bool has_begin = p.marks == nullptr && begin != nullptr;
    R h = has_begin ? begin[(b * p.dim + d) * p.state + n] : R(0);
    for (int64_t j = 0; j < p.parts; ++j) {
      const int64_t part = backward ? p.parts - 1 - j : j, at = part * tasks + i;
      const bool ends = j + 1 == p.parts;
      const R walked = ends ? R(0) : carry[at], a = ends ? R(0) : factor[at];
      carry[at] = h;
      h = a < 0 ? walked : next_state(a, h, R(1), walked);
    }
  }
}

template <bool kBackward>
void launch_parts(const Inputs& p, Layout layout, cudaStream_t stream) {
  with_layout<Wide>(layout, p.compute, [&](auto config) {
    using C = decltype(config);
    const int64_t blocks = (p.group_dim() + C::kChannels - 1) / C::kChannels;
    const int state_blocks = int((p.state + C::kStates - 1) / C::kStates);
    const int64_t tasks = (p.parts - 1) * p.batch * p.groups * blocks * state_blocks;
    launch("selective_scan parts", part_kernel<C, kBackward>, blocks_for(tasks, 1), C::kThreads,
           sizeof(PartShared<C, kBackward>), stream, p, state_blocks, tasks);
  });
}

}  // namespace

void find_carries(const Inputs& p, Layout layout, bool backward, cudaStream_t stream) {
  backward ? launch_parts<true>(p, layout, stream) : launch_parts<false>(p, layout, stream);
  const int64_t tasks = p.batch * p.state * p.dim;
  auto run = [&](auto* type) {
    launch("selective_scan carry", carry_kernel<std::remove_pointer_t<decltype(type)>>,
           blocks_for(tasks, 128), 128, 0, stream, p, Divisor(p.dim), Divisor(p.state), backward,
           tasks);
  };
  p.compute == DType::kFloat64 ? run(static_cast<double*>(nullptr))
                               : run(static_cast<float*>(nullptr));
}

}  // namespace statescan::selective_scan::cuda
