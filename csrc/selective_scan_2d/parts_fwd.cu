// Forward of the selective scan along routes, all parts of a route at the same time; see parts.cuh for
// who does what.
//
// Grid over (batch, route, part, block of groups). Shared memory: rows; numbers of each thread, A (state),
// h (state), dt_weight (rank).
#include "common/launch.h"
#include "selective_scan_2d/part_steps.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

// All steps of a part, as far as there are any. Adds to the sum of step sizes, or to planes of y.
template <bool kOutputs>
__device__ __forceinline__ void walk_part(const PartWalk& w, int64_t begin, const float* u_column,
                                          float* y_column, bool repeats, float& step_sum) {
  const int64_t h = w.p.state;
#pragma unroll 1
  for (int t = 0; t < kPartSteps && begin + t < w.p.steps; t += kSome) {
    const Places place(w.memory, t);
    const unsigned starts = find_starts(w.p, begin + t);
    Numbers delta, delta_u, y, before;
    load_tokens(w.p, u_column, place, delta_u);
    if (kOutputs && !repeats) load_tokens(w.p, y_column, place, before);
    find_delta(w, begin, t, delta);
    find_step_sizes(w.p, place, delta);
#pragma unroll
    for (int j = 0; j < kSome; ++j) {
      y[j] = w.k.D * delta_u[j];
      delta_u[j] *= delta[j];
      if (!kOutputs) step_sum += delta[j];
    }
    with_starts(starts != 0, [&](auto any) {
      walk_states<kOutputs, decltype(any)::value>(w, starts, t, h, h, delta, delta_u, y);
    });
    if (kOutputs) add_tokens(w.p, y_column, place, repeats, w.k.weight, before, y);
  }
}

__global__ __launch_bounds__(kFwdPartThreads) void ends_kernel(const __grid_constant__ FwdParams p,
                                                               const Deal deal) {
  for (int64_t i = blockIdx.x; i < deal.tasks; i += gridDim.x) {
    const PartTask task = part_task(p, deal, i);
    const PartWalk w{p, task, 2 * p.state};
    const int64_t begin = task.part * kPartSteps;
    stage_part(p, task, begin, true, false, w.memory);
    if (!task.warp_there) continue;
    w.load_parameters();
    w.fill(p.state, p.state);
    float step_sum = 0;
    walk_part<false>(w, begin, u_column(p, task), nullptr, false, step_sum);
    w.store_states(p.parts.h + state_at(p, task, task.part), p.state);
    if (task.there) p.parts.step_sums[step_sum_at(p, task, task.part)] = step_sum;
  }
}

__global__ __launch_bounds__(kFwdPartThreads,
                             3) void walk_kernel(const __grid_constant__ FwdParams p,
                                                 const Deal deal) {
  for (int64_t i = blockIdx.x; i < deal.tasks; i += gridDim.x) {
    const PartTask task = part_task(p, deal, i);
    const bool repeats = has_repeats(p, task);
    if (repeats && task.part > 0) continue;
    const int64_t end = repeats ? p.parts.count : task.part + 1;
    const PartWalk w{p, task, 2 * p.state};
    if (task.warp_there) w.load_parameters();
    for (int64_t part = task.part; part < end; ++part) {
      const int64_t begin = part * kPartSteps;
      stage_part(p, task, begin, true, true, w.memory);
      if (!task.warp_there) continue;
      w.load_states(p.parts.h + state_at(p, task, part), p.state);
      float unused = 0;
      walk_part<true>(w, begin, u_column(p, task), sum_column(p, p.parts.y, task), repeats, unused);
    }
  }
}

}  // namespace

void fwd_in_parts(const FwdParams& p, cudaStream_t stream) {
  const int threads = p.parts.warps * kLanes;
  const size_t shared_bytes = size_t(p.parts.shared_bytes);
  into_planes(p, p.u, {}, p.u_per_route ? p.routes : 1, p.parts.u, p.parts.y, stream);
  const Deal all(p, 0, p.routes);
  launch("selective_scan_2d ends", ends_kernel, blocks_for(all.tasks, 1), threads, shared_bytes,
         stream, p, all);
  carry_parts(p, false, p.initial_state, p.last_state, p.chunk_states, stream);
  for_rounds(p, p.parts.at_once, [&](const Deal& deal) {
    launch("selective_scan_2d parts", walk_kernel, blocks_for(deal.tasks, 1), threads, shared_bytes,
           stream, p, deal);
  });
  from_planes(p, p.parts.y, p.y_per_route, p.y, p.z, nullptr, stream);
}

}  // namespace statescan::selective_scan_2d::cuda
