// Backward of the short convolution, one number at a time: any dtypes, strides and widths, and what
// states reach.
#pragma once

#include "causal_conv1d/padded.cuh"

namespace statescan::causal_conv1d::cuda {

constexpr int kBwdThreads = 128;

// The gradient of what is before the activation, at time t; 0 outside of the run.
template <class R>
__device__ __forceinline__ R padded_dpre(const BwdParams& p, const Run& run, int64_t b, int64_t c,
                                         int64_t t) {
  if (!p.dy || t < run.begin || t >= run.end) return R(0);
  const R dy = load_element<R>(p.dy.data, p.dy.dtype,
                               b * p.dy.stride[0] + c * p.dy.stride[1] + t * p.dy.stride[2]);
  return activate_vjp(padded_pre<R>(p, run, b, c, t), dy, p.silu);
}

// The gradient of the input at time t of a padded run.
template <class R>
__device__ __forceinline__ R padded_dx(const BwdParams& p, const Run& run, int64_t b, int64_t c,
                                       int64_t t) {
  R dx = 0;
#pragma unroll 1
  for (int64_t k = 0; k < p.width; ++k) {
    dx += load_tap<R>(p, c, k) * padded_dpre<R>(p, run, b, c, t + p.left() - k);
  }
  const View<3>& state = p.dfinal_state;
  const bool last_first = p.mode == Mode::kAnticausal;
  const int64_t slot = state ? final_slot(p.sequences, run, b, last_first) : -1;
  const int64_t i = t - (last_first ? run.begin : run.end - (p.width - 1));
  if (slot < 0 || i < 0 || i >= p.width - 1) return dx;
  return dx + load_element<R>(state.data, state.dtype,
                              slot * state.stride[0] + c * state.stride[1] + i * state.stride[2]);
}

__device__ __forceinline__ Run run_near(const BwdParams& p, int64_t b, int64_t t) {
  return run_at(p.sequences, b, t, 2 * (p.width - 1), p.mode == Mode::kAnticausal);
}

template <class R>
__device__ __forceinline__ void store_dx(const BwdParams& p, int64_t b, int64_t c, int64_t t,
                                         R dx) {
  store_element(p.dx.data, p.dx.dtype, b * p.dx.stride[0] + c * p.dx.stride[1] + t * p.dx.stride[2],
                dx);
}

// What the output at time t adds to dweight[k], or for k = width to dbias.
template <class R>
__device__ __forceinline__ R padded_term(const BwdParams& p, const Run& run, int64_t b, int64_t c,
                                         int64_t t, int64_t k) {
  const R dpre = padded_dpre<R>(p, run, b, c, t);
  return k == p.width ? dpre : dpre * padded_input<R>(p, run, b, c, t + k - p.left());
}

// ---- what a state reaches

// The first and the last run of a batch element, or a packed sequence as both.
struct Ends {
  int64_t begin, first_end, last_begin, end;
};

__device__ __forceinline__ Ends ends_of(const Run& run) {
  return {run.begin, run.end, run.begin, run.end};
}

__device__ __forceinline__ Ends ends_of(const Sequences& s, int64_t b) {
  if (!s.ids) return {0, s.seqlen, 0, s.seqlen};
  if (s.ends == nullptr) return {};
  const RunEnds e = s.ends[b];
  return {e.begin, e.first_end, e.last_begin, e.end};
}

struct Interval {
  int64_t begin, end;
  __device__ __forceinline__ bool holds(int64_t t) const { return t >= begin && t < end; }
};

// The width - 1 outputs that see an initial state, and the inputs that only they see, lie at one end of
// a run; the width - 1 inputs that are copied into a final state at the other. The fast kernels leave
// both to edge_dx_kernel and edge_sums_kernel.
struct Edges {
  Interval initial, final;

  __device__ __forceinline__ Edges(const BwdParams& p, const Ends& e) {
    const int64_t reach = p.width - 1;
    const int64_t low = e.begin + reach, high = e.end - reach;
    const Interval early{e.begin, low < e.first_end ? low : e.first_end};
    const Interval late{high > e.last_begin ? high : e.last_begin, e.end};
    const bool last_first = p.mode == Mode::kAnticausal;
    initial = p.initial_state ? (last_first ? late : early) : Interval{0, 0};
    final = p.dfinal_state ? (last_first ? early : late) : Interval{0, 0};
  }
};

}  // namespace statescan::causal_conv1d::cuda
