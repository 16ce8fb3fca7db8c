// The walk forward over a tile in shared memory, which the forward, the search for the states
// between parts and the backward share.
#pragma once

#include "selective_scan/staging.cuh"

namespace statescan::selective_scan::cuda {

// Steps whose outputs are summed over the lanes together: each lane keeps the sums of one of them.
inline constexpr int kBatch = 4;

template <class C>
using Kept = typename C::R[C::kC][C::kS];

// What a lane knows of its channels and states that does not change in time.
template <class C>
struct Parameters {
  Kept<C> A;         // times log2(e)
  Kept<C> fixed[2];  // B and C where they are constant; without kAny they are not
  bool is_fixed[2];

  __device__ __forceinline__ void load(const Inputs& p, const Task& task, int first) {
    using R = typename C::R;
    load_table<C>(p.A, p, task, first, R(kLog2e), A);
    if constexpr (C::kAny) {
      is_fixed[0] = p.constant_B, is_fixed[1] = p.constant_C;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const View<4>& x = p.projection[i];
        if (is_fixed[i]) {
          load_table<C>(View<2>{x.data, x.dtype, {x.stride[1], x.stride[2]}}, p, task, first, R(1),
                        fixed[i]);
        }
      }
    }
  }

  // B (0) or C (1) of channel c and state s; `step` is what its tile holds for the step.
  __device__ __forceinline__ typename C::R projection(int i,
                                                      const Several<typename C::R, C::kS>& step,
                                                      int c, int s) const {
    if constexpr (C::kAny) {
      if (is_fixed[i]) return fixed[i][c][s];
    }
    return step.x[s];
  }
};

// A tile as a walk sees it. kMarked: sequences may start or end in it, and each step has to look; a
// walk that need not is scheduled much better.
template <class C, bool kMarked>
struct Steps {
  const Inputs& p;
  const Task& task;
  int first_state;  // of the block of states
  TileInfo& info;
  Tile<C>&delta, &delta_u;
  SharedArray<StateTile<C>, 2>& projection;  // B, C

  __device__ __forceinline__ Several<typename C::R, C::kC> channels(Tile<C>& tile, int step,
                                                                    const Lane<C>& lane) const {
    return several<C::kC>(tile[step * C::kPitch + lane.channel]);
  }
  __device__ __forceinline__ Several<typename C::R, C::kS> states(const Parameters<C>& k, int i,
                                                                  int step,
                                                                  const Lane<C>& lane) const {
    if (C::kAny && k.is_fixed[i]) return {};  // there is none in shared memory
    return several<C::kS>(projection[i][step * C::kStatePitch + lane.q * C::kS]);
  }
};

// Adds what kBatch steps from `first` on have as sums over a lane's states: [step][channel].
template <class C>
__device__ __forceinline__ void add_outputs(typename C::R (&sums)[kBatch * C::kC],
                                            const Lane<C>& lane, int first, Tile<C>& y) {
  sum_over_states<C>(sums, lane.q);
#pragma unroll
  for (int j = 0; j < kBatch / C::kL; ++j) {
    const int i = first + lane.q * (kBatch / C::kL) + j;
    auto& out = several<C::kC>(y[i * C::kPitch + lane.channel]);
    auto v = out;
#pragma unroll
    for (int c = 0; c < C::kC; ++c) v.x[c] += sums[j * C::kC + c];
    out = v;
  }
}

// Calls f(tag: are there marks to look for). kAny is for what is rare: it always looks.
template <class C, class F>
__device__ __forceinline__ void with_marked(bool marked, F&& f) {
  if (C::kAny || marked) return f(std::true_type{});
  if constexpr (!C::kAny) f(std::false_type{});
}

// Walks h over steps [begin, end), a multiple of kBatch. With kOutputs, adds sum_n C h to y.
// after(step, h): after every step.
template <class C, bool kOutputs, bool kMarked, class After>
__device__ __forceinline__ void walk(const Steps<C, kMarked>& x, const Parameters<C>& k, Kept<C>& h,
                                     Tile<C>& y, int begin, int end, After&& after) {
  using R = typename C::R;
  const Lane<C> lane;
#pragma unroll 1
  for (int i0 = begin; i0 < end; i0 += kBatch) {
    R sums[kBatch * C::kC];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = i0 + j;
      if (kMarked && x.info.mark[i] & kStart) {
        load_start<C>(x.p, x.task, x.info, i, x.first_state, h);
      }
      const auto delta = x.channels(x.delta, i, lane), delta_u = x.channels(x.delta_u, i, lane);
      const auto B = x.states(k, 0, i, lane);
      Several<R, C::kS> C_t{};
      if constexpr (kOutputs) C_t = x.states(k, 1, i, lane);
#pragma unroll
      for (int c = 0; c < C::kC; ++c) {
        R sum = 0;
#pragma unroll
        for (int s = 0; s < C::kS; ++s) {
          h[c][s] = next_state(decay(delta.x[c], k.A[c][s]), h[c][s], delta_u.x[c],
                               k.projection(0, B, c, s));
          if constexpr (kOutputs) sum += k.projection(1, C_t, c, s) * h[c][s];
        }
        sums[j * C::kC + c] = sum;
      }
      after(i, h);
    }
    if constexpr (kOutputs) add_outputs<C>(sums, lane, i0, y);
  }
}

// Backward: adds to dh what comes from outside of the scan after a step: the gradient of a last state,
// or of all states.
template <class C>
__device__ __forceinline__ void add_state_gradients(const Inputs& p, const Task& task,
                                                    TileInfo& info, int step, int first,
                                                    Kept<C>& dh) {
  using R = typename C::R;
  if (p.dlast != nullptr && info.mark[step] & kToSlot) {
    for_states<C>(static_cast<const R*>(p.dlast) + info.slot[step] * p.dim * p.state, false, p,
                  task, first, [&](const R* from, int c, int s) { dh[c][s] += *from; });
  }
  if constexpr (C::kAny) {
    const View<4>& x = p.dstates;
    const int row = in_scan(p, step);
    if (!x || !(info.inside >> row & 1)) return;
    const int64_t t = info.span.begin + row;
    const Lane<C> lane;
#pragma unroll
    for (int s = 0; s < C::kS; ++s) {
      const int64_t n = first + lane.q * C::kS + s, d = task.channel + lane.channel;
      if (lane.channel >= task.channels || n >= p.state) continue;
      dh[0][s] += load_element<R>(
          x.data, x.dtype,
          task.b * x.stride[0] + t * x.stride[1] + d * x.stride[2] + n * x.stride[3]);
    }
  }
}

// What a thread keeps from tile to tile, where it cannot hold all of its states at once.
template <class C>
__device__ __forceinline__ typename C::R* kept_at(void* kept, int64_t task, int64_t blocks,
                                                  int64_t block) {
  return static_cast<typename C::R*>(kept) + (task * blocks + block) * C::kKept * C::kThreads +
         threadIdx.x;
}
template <class C>
__device__ __forceinline__ void load_kept(const typename C::R* from, Kept<C>& h) {
#pragma unroll
  for (int i = 0; i < C::kKept; ++i) h[i / C::kS][i % C::kS] = from[i * C::kThreads];
}
template <class C>
__device__ __forceinline__ void store_kept(typename C::R* to, const Kept<C>& h) {
#pragma unroll
  for (int i = 0; i < C::kKept; ++i) to[i * C::kThreads] = h[i / C::kS][i % C::kS];
}

// Of a tensor (.., batch, state, dim) in the compute type.
template <class C>
__device__ __forceinline__ typename C::R* state_row(const void* states, const Shape& p, int64_t i) {
  return static_cast<typename C::R*>(const_cast<void*>(states)) + i * p.state * p.dim;
}

}  // namespace statescan::selective_scan::cuda
