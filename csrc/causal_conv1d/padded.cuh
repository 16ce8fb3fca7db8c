// One output of the short convolution at a time, anywhere in a sequence and for any dtypes and width:
// what the fast kernels leave out, and all that there is to the others.
#pragma once

#include "causal_conv1d/cuda.h"
#include "common/device_view.cuh"
#include "common/scalar.cuh"

#include "causal_conv1d/equations.h"

namespace statescan::causal_conv1d::cuda {

// Which tap is the k-th in order of time.
STATESCAN_HOST_DEVICE int64_t tap_index(const Shape& p, int64_t k) {
  return p.mode == Mode::kAnticausal ? p.width - 1 - k : k;
}

template <class R>
__device__ __forceinline__ R load_bias(const FwdParams& p, int64_t c) {
  return p.bias ? load_element<R>(p.bias.data, p.bias.dtype, c * p.bias.stride[0]) : R(0);
}

// The input at time t of a run, which may be up to width - 1 before or after it: then of its initial
// state, or zero.
template <class R>
__device__ __forceinline__ R padded_input(const FwdParams& p, const Run& run, int64_t b, int64_t c,
                                          int64_t t) {
  if (t >= run.begin && t < run.end) {
    return load_element<R>(p.x.data, p.x.dtype,
                           b * p.x.stride[0] + c * p.x.stride[1] + t * p.x.stride[2]);
  }
  const View<3>& state = p.initial_state;
  if (!state || run.slot < 0) return R(0);
  const int64_t i = t < run.begin ? t - run.begin + p.width - 1 : t - run.end;
  if (i < 0 || i >= p.width - 1) return R(0);  // only where offsets of sequences make no sense
  return load_element<R>(state.data, state.dtype,
                         run.slot * state.stride[0] + c * state.stride[1] + i * state.stride[2]);
}

template <class R>
__device__ __forceinline__ void padded_output(const FwdParams& p, int64_t b, int64_t c, int64_t t) {
  const Run run = run_at(p.sequences, b, t, p.width - 1, p.mode == Mode::kAnticausal);
  R y = 0;
  if (run.begin < run.end) {  // not padding
    R pre = load_bias<R>(p, c);
    for (int64_t k = 0; k < p.width; ++k) {
      const R w = load_element<R>(p.weight.data, p.weight.dtype,
                                  c * p.weight.stride[0] + tap_index(p, k) * p.weight.stride[1]);
      pre += w * padded_input<R>(p, run, b, c, t + k - p.left());
    }
    y = activate(pre, p.silu);
  }
  store_element(p.y.data, p.y.dtype, b * p.y.stride[0] + c * p.y.stride[1] + t * p.y.stride[2], y);
}

}  // namespace statescan::causal_conv1d::cuda
