// Backward of the selective scan along routes, all parts of a route at the same time; see parts.cuh for
// who does what. What each part makes of h = 0, and of dh = 0 on the way back, is found in one pass; both
// are carried; then each part is walked forward, keeping h every 8 steps, and back.
//
//   map --u, dy--> planes --> ends, carries --> walk forward, walk back --add--> planes of du (and y)
//                                                 | sums over the 32 channels of a group
//                                                 v
//                          dB, dC, ddt of each group, dA, ddt_weight, .. of each part, added up in order
//
// Grid over (batch, route, part, block of groups). Shared memory: rows; numbers of each thread: A, dh, h
// (state), for the walk dA (state) and h (state) instead for every 8 steps; dt_weight (rank), ddt_weight.
#include "common/launch.h"
#include "selective_scan_2d/part_steps.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

using selective_scan::step_vjp;

__device__ __forceinline__ const float* dy_column(const Inputs& p, const PartTask& t) {
  return column_of(p, p.parts.dy, t.b, p.y_per_route ? p.routes : 1, p.y_per_route ? t.route : 0,
                   t.group);
}

// Where states are in a thread's numbers.
struct Ends {
  int64_t dh, h;
  __device__ __forceinline__ explicit Ends(const Inputs& p) : dh(p.state), h(2 * p.state) {}
  STATESCAN_HOST_DEVICE static int64_t dt_weight(const Problem& p) { return 3 * p.state; }
};
struct Walked {
  int64_t dh, dA, h, ddt_weight;  // h: before the first steps; before the next ones `state` further
  __device__ __forceinline__ explicit Walked(const Inputs& p)
      : dh(p.state), dA(2 * p.state), h(3 * p.state), ddt_weight(dt_weight(p) + p.rank) {}
  STATESCAN_HOST_DEVICE static int64_t dt_weight(const Problem& p) {
    return part_numbers(p, true) - 2 * p.rank;
  }
};

// What comes after some steps: the sum of step sizes, and whether the state starts anew there.
struct After {
  float step_sum = 0;
  bool starts = false;
};

// The share of some steps in the end of h, and dh before them from dh after them.
template <bool kStarts>
__device__ __forceinline__ void end_states(const PartWalk& w, const Ends& at, unsigned starts,
                                           int t, const After& after, const Numbers& delta,
                                           const Numbers& delta_u, const Numbers& dy) {
  const int to_C = w.to_C(), to_h = w.numbers(at.h), to_dh = w.numbers(at.dh);
  for_states(w, t, [&](int, float* row, float* own) {
    const float A = *own;
    float h = own[to_h], dh = own[to_dh], product = decay(after.step_sum, A);
    bool through = !after.starts;
    Numbers B, C;
    load_numbers(row, B);
    load_numbers(row + to_C, C);
#pragma unroll
    for (int j = kSome - 1; j >= 0; --j) {
      const float a = decay(delta[j], A);
      if (!kStarts || through) h += product * (delta_u[j] * B[j]);
      product *= a;
      dh = a * (dh + C[j] * dy[j]);
      if (kStarts && starts >> j & 1) through = false, dh = 0;
    }
    own[to_h] = h, own[to_dh] = dh;
  });
}

// The steps of a part in pieces of some, from the last to the first.
template <class F>
__device__ __forceinline__ void for_steps_back(const Inputs& p, int64_t begin, F&& f) {
  const int64_t left = p.steps - begin;
  const int count = left < kPartSteps ? int(left) : kPartSteps;
#pragma unroll 1
  for (int t = (count - 1) / kSome * kSome; t >= 0; t -= kSome) f(t);
}

__global__ __launch_bounds__(kBwdPartThreads,
                             6) void ends_kernel(const __grid_constant__ BwdParams p,
                                                 const Deal deal) {
  for (int64_t i = blockIdx.x; i < deal.tasks; i += gridDim.x) {
    const PartTask task = part_task(p, deal, i);
    const PartWalk w{p, task, Ends::dt_weight(p)};
    const Ends at(p);
    const int64_t begin = task.part * kPartSteps;
    stage_part(p, task, begin, true, true, w.memory);
    if (!task.warp_there) continue;
    w.load_parameters();
    w.fill(at.dh, 2 * p.state);
    const float *u = u_column(p, task), *dy = dy_column(p, task);
    After after;
    for_steps_back(p, begin, [&](int t) {
      const Places place(w.memory, t);
      const unsigned starts = find_starts(p, begin + t);
      Numbers delta, delta_u, dy_t;
      load_tokens(p, u, place, delta_u);
      load_tokens(p, dy, place, dy_t);
      find_delta(w, begin, t, delta);
      find_step_sizes(p, place, delta);
#pragma unroll
      for (int j = 0; j < kSome; ++j) delta_u[j] *= delta[j], dy_t[j] *= w.k.weight;
      with_starts(after.starts || starts != 0, [&](auto any) {
        end_states<decltype(any)::value>(w, at, starts, t, after, delta, delta_u, dy_t);
      });
#pragma unroll
      for (int j = 0; j < kSome; ++j) after.step_sum += delta[j];
      after.starts |= starts != 0;
    });
    w.store_states(p.parts.h + state_at(p, task, task.part), at.h);
    w.store_states(p.parts.dh + state_at(p, task, task.part), at.dh);
    if (task.there) p.parts.step_sums[step_sum_at(p, task, task.part)] = after.step_sum;
  }
}

// Gradients of parameters, of the lane's channel in a part.
struct Sums {
  float dD = 0, dbias = 0, dweight = 0;
};

// A lane's steps.
struct Steps {
  Numbers delta, u, dy;  // dy times the route's weight
  Numbers d_delta, d_delta_u, y;
};

// dB and dC of some steps and a state, summed over the lanes.
__device__ __forceinline__ void store_projections(const BwdParams& p, const PartTask& task,
                                                  int64_t t, int n, const Numbers& dB,
                                                  const Numbers& dC) {
  const int lane = int(threadIdx.x) % kLanes;
  float v[2 * kSome];
#pragma unroll
  for (int j = 0; j < kSome; ++j) v[j] = dB[j], v[kSome + j] = dC[j];
  const float sum = sums_over_warp<2 * kSome>(v, lane);
  const int i = lane / 2;
  t += i % kSome;
  if (lane % 2 != 0 || t >= p.steps) return;
  const int64_t row = (task.group * p.routes + task.route) * p.batch + task.b;
  static_cast<float*>(i < kSome ? p.dB : p.dC)[(row * p.steps + t) * p.state + n] = sum;
}

// All states along some steps from h before them, and back from dh after them.
template <bool kStarts>
__device__ __forceinline__ void walk_states_back(const BwdParams& p, const PartWalk& w,
                                                 const Walked& at, unsigned starts, int64_t begin,
                                                 int t, bool with_y, Steps& x) {
  const int to_C = w.to_C(), to_h = w.numbers(at.h + t / kSome * p.state);
  const int to_dh = w.numbers(at.dh), to_dA = w.numbers(at.dA);
  for_states(w, t, [&](int n, float* row, float* own) {
    const float A = *own, first = own[to_h];
    Numbers a, h, B, C, dB, dC;
    load_numbers(row, B);
    load_numbers(row + to_C, C);
#pragma unroll
    for (int j = 0; j < kSome; ++j) {
      const bool anew = kStarts && starts >> j & 1;
      const float h_prev = anew ? 0 : j == 0 ? first : h[j == 0 ? 0 : j - 1];
      a[j] = decay(x.delta[j], A);
      h[j] = selective_scan::next_state(a[j], h_prev, x.delta[j] * x.u[j], B[j]);
    }
    if (with_y) {
#pragma unroll
      for (int j = 0; j < kSome; ++j) x.y[j] += C[j] * h[j];
    }
    float dh = own[to_dh], dA = 0;
#pragma unroll
    for (int j = kSome - 1; j >= 0; --j) {
      const bool anew = kStarts && starts >> j & 1;
      const float h_prev = anew ? 0 : j == 0 ? first : h[j == 0 ? 0 : j - 1];
      step_vjp(a[j], h_prev, h[j], x.delta[j], x.delta[j] * x.u[j], A, B[j], C[j], x.dy[j], dh, dA,
               dB[j], dC[j], x.d_delta[j], x.d_delta_u[j]);
      if (anew) dh = 0;
    }
    own[to_dh] = dh;
    own[to_dA] += dA;
    store_projections(p, w.task, begin + t, n, dB, dC);
  });
}

// ddelta as delta is given whole.
__device__ __forceinline__ void store_ddelta(const BwdParams& p, const PartTask& task, int64_t t,
                                             const Numbers& ddelta) {
  if (!task.there) return;
  const View<4>& x = p.ddelta;
  const int64_t first = task.b * x.stride[0] + task.route * x.stride[1] +
                        task.channel * x.stride[2] + t * x.stride[3];
  if (p.delta_shared) {  // the routes add up, in their order
    float* sum = static_cast<float*>(x.data) + first;
#pragma unroll
    for (int j = 0; j < kSome; ++j) {
      if (t + j < p.steps) sum[j] = task.route == 0 ? ddelta[j] : sum[j] + ddelta[j];
    }
    return;
  }
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= 4) {
      T* to = static_cast<T*>(x.data) + first;
      constexpr int kPack = kPackSize<T>;
      if (x.stride[3] == 1 && t + kSome <= p.steps && is_aligned(to, x.stride[2], kPack)) {
#pragma unroll
        for (int i = 0; i < kSome; i += kPack) {
          float pack[kPack];
#pragma unroll
          for (int j = 0; j < kPack; ++j) pack[j] = ddelta[i + j];
          Pack<T, kPack>::of(pack).store(to + i);
        }
        return;
      }
#pragma unroll
      for (int j = 0; j < kSome; ++j) {
        if (t + j < p.steps) to[j * x.stride[3]] = from_number<T>(ddelta[j]);
      }
    }
  });
}

// ddt, summed over the lanes, and the lane's ddt_weight.
__device__ __forceinline__ void store_ddt(const BwdParams& p, const PartWalk& w, const Walked& at,
                                          int64_t begin, int t, const Numbers& ddelta) {
  const int lane = int(threadIdx.x) % kLanes, i = lane / (kLanes / kSome);
  const PartTask& task = w.task;
  const int64_t row = (task.group * p.routes + task.route) * p.batch + task.b;
  const bool stores = lane % (kLanes / kSome) == 0 && begin + t + i < p.steps;
  float* to = static_cast<float*>(p.ddt) + row * p.rank * p.steps + begin + t + i;
  float* dt_row = w.memory.row + t;
#pragma unroll 1
  for (int64_t r = 0; r < p.rank; ++r, dt_row += kPartSteps, to += p.steps) {
    const float weight = w.memory(w.dt_weight + r);
    Numbers dt, v;
    load_numbers(dt_row, dt);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kSome; ++j) {
      v[j] = weight * ddelta[j];
      sum += dt[j] * ddelta[j];
    }
    w.memory(at.ddt_weight + r) += sum;
    const float ddt = sums_over_warp<kSome>(v, lane);
    if (stores) *to = ddt;
  }
}

// Step sizes; u and dy of the steps are there.
__device__ __forceinline__ void begin_steps(const PartWalk& w, const Places& place, int64_t begin,
                                            int t, Steps& x) {
  find_delta(w, begin, t, x.delta);
  find_step_sizes(w.p, place, x.delta);
#pragma unroll
  for (int j = 0; j < kSome; ++j) {
    x.dy[j] *= w.k.weight;
    x.d_delta[j] = x.d_delta_u[j] = 0;
    x.y[j] = w.k.D * x.u[j];
  }
}

// The slope of softplus where it is delta: 1 - e^-delta.
__device__ __forceinline__ float slope_at(float delta) {
  if (delta > 0.25f) return 1 - exp2(delta * -float(kLog2e));
  float p = std::fma(delta, -1.0f / 720, 1.0f / 120);
  p = std::fma(delta, p, -1.0f / 24);
  p = std::fma(delta, p, 1.0f / 6);
  p = std::fma(delta, p, -0.5f);
  return std::fma(delta, p * delta, delta);
}

// After the last state: delta becomes ddelta.
__device__ __forceinline__ void end_steps(const BwdParams& p, const PartWalk& w, int t,
                                          bool repeats, Steps& x, Sums& sums) {
  const Places place(w.memory, t);  // again, rather than kept while states are walked
  Numbers du, before;
  float* to = sum_column(p, p.parts.du, w.task);
  if (!repeats) load_tokens(p, to, place, before);
#pragma unroll
  for (int j = 0; j < kSome; ++j) {
    const bool skipped = place.at[j] == kSkip;
    const float slope = p.delta_softplus ? slope_at(x.delta[j]) : 1.0f;
    du[j] = w.k.D * x.dy[j] + x.delta[j] * x.d_delta_u[j];
    x.delta[j] = skipped ? 0 : (x.d_delta[j] * float(kLn2) + x.u[j] * x.d_delta_u[j]) * slope;
    sums.dD += x.dy[j] * x.u[j];
    sums.dbias += x.delta[j];
  }
  add_tokens(p, to, place, repeats, 1.0f, before, du);
  if (p.weights) {
    load_tokens(p, dy_column(p, w.task), place, before);
#pragma unroll
    for (int j = 0; j < kSome; ++j) sums.dweight += x.y[j] * before[j];
  }
  if (!p.z) return;
  to = sum_column(p, p.parts.y, w.task);
  if (!repeats) load_tokens(p, to, place, before);
  add_tokens(p, to, place, repeats, w.k.weight, before, x.y);
}

// h before every some steps of a part, from that before the first.
__device__ __forceinline__ void keep_states(const PartWalk& w, const Walked& at, int64_t begin) {
  const float* u = u_column(w.p, w.task);
  int64_t h = at.h;
#pragma unroll 1
  for (int t = 0; t + kSome < kPartSteps && begin + t + kSome < w.p.steps; t += kSome) {
    const Places place(w.memory, t);
    const unsigned starts = find_starts(w.p, begin + t);
    Numbers delta, delta_u, none;
    load_tokens(w.p, u, place, delta_u);
    find_delta(w, begin, t, delta);
    find_step_sizes(w.p, place, delta);
#pragma unroll
    for (int j = 0; j < kSome; ++j) delta_u[j] *= delta[j];
    with_starts(starts != 0, [&](auto any) {
      walk_states<false, decltype(any)::value>(w, starts, t, h, h + w.p.state, delta, delta_u,
                                               none);
    });
    h += w.p.state;
  }
}

__device__ __forceinline__ void walk_part(const BwdParams& p, const PartWalk& w, const Walked& at,
                                          int64_t part, bool repeats) {
  const PartTask& task = w.task;
  const int64_t begin = part * kPartSteps;
  w.load_states(p.parts.dh + state_at(p, task, part), at.dh);
  w.load_states(p.parts.h + state_at(p, task, part), at.h);
  w.fill(at.dA, p.state);
  w.fill(at.ddt_weight, p.rank);
  keep_states(w, at, begin);
  Sums sums;
  for_steps_back(p, begin, [&](int t) {
    const unsigned starts = find_starts(p, begin + t);
    Steps x;
    {
      const Places place(w.memory, t);
      load_tokens(p, u_column(p, task), place, x.u);
      load_tokens(p, dy_column(p, task), place, x.dy);
      begin_steps(w, place, begin, t, x);
    }
    with_starts(starts != 0, [&](auto any) {
      walk_states_back<decltype(any)::value>(p, w, at, starts, begin, t, p.z || p.weights, x);
    });
    end_steps(p, w, t, repeats, x, sums);
    p.rank == 0 ? store_ddelta(p, task, begin + t, x.delta)
                : store_ddt(p, w, at, begin, t, x.delta);
  });
  if (!task.there) return;
  const int64_t row =
      ((task.b * p.parts.count + part) * p.routes + task.route) * p.dim + task.channel;
  auto store = [&](void* to, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      static_cast<float*>(to)[row * count + i] = w.memory(first + i);
    }
  };
  store(p.dA, at.dA, p.state);
  store(p.ddt_weight, at.ddt_weight, p.rank);
  if (p.D) static_cast<float*>(p.dD)[row] = sums.dD;
  if (p.delta_bias) static_cast<float*>(p.ddelta_bias)[row] = sums.dbias;
  if (p.weights) static_cast<float*>(p.dweights)[row] = sums.dweight;
}

__global__ __launch_bounds__(kBwdPartThreads,
                             3) void walk_kernel(const __grid_constant__ BwdParams p,
                                                 const Deal deal) {
  for (int64_t i = blockIdx.x; i < deal.tasks; i += gridDim.x) {
    const PartTask task = part_task(p, deal, i);
    const bool repeats = has_repeats(p, task);
    if (repeats && task.part > 0) continue;
    const int64_t last = repeats ? p.parts.count - 1 : task.part;
    const PartWalk w{p, task, Walked::dt_weight(p)};
    const Walked at(p);
    if (task.warp_there) w.load_parameters();
    for (int64_t part = last; part >= task.part; --part) {
      stage_part(p, task, part * kPartSteps, true, true, w.memory);
      if (task.warp_there) walk_part(p, w, at, part, repeats);
    }
  }
}

}  // namespace

void bwd_in_parts(const BwdParams& p, cudaStream_t stream) {
  const int threads = p.parts.warps * kLanes;
  into_planes(p, p.u, {}, p.u_per_route ? p.routes : 1, p.parts.u, p.parts.du, stream);
  into_planes(p, p.dy, p.z, p.y_per_route ? p.routes : 1, p.parts.dy, p.parts.y, stream);
  const Deal all(p, 0, p.routes);
  launch("selective_scan_2d ends back", ends_kernel, blocks_for(all.tasks, 1), threads,
         size_t(part_memory_bytes(p, Ends::dt_weight(p) + p.rank, p.parts.warps)), stream, p, all);
  carry_parts(p, false, p.initial_state, {}, nullptr, stream);
  carry_parts(p, true, p.dlast_state, p.dinitial_state, nullptr, stream);
  // Where the routes share delta they add up in its gradient, one after the other.
  for_rounds(p, p.rank == 0 && p.delta_shared ? 1 : p.parts.at_once, [&](const Deal& deal) {
    launch("selective_scan_2d parts back", walk_kernel, blocks_for(deal.tasks, 1), threads,
           size_t(p.parts.shared_bytes), stream, p, deal);
  });
  from_planes(p, p.parts.du, p.u_per_route, p.du, {}, nullptr, stream);
  if (p.z) from_planes(p, p.parts.y, false, with_routes(p.dz), p.z, &p.dy, stream);
}

}  // namespace statescan::selective_scan_2d::cuda
