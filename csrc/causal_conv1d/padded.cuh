// One output of the short convolution at a time, anywhere in a sequence and for any dtypes and
// width: what the fast kernels leave out, and all that there is to the others.
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
__device__ __forceinline__ R load_bias(const Inputs& p, int64_t c) {
  return p.bias ? load_element<R>(p.bias.data, p.bias.dtype, c * p.bias.stride[0]) : R(0);
}

// The input at time t of a run, which may be up to width - 1 before or after it: then of its
// initial state, or zero.
template <class R>
__device__ __forceinline__ R padded_input(const Inputs& p, const Run& run, int64_t b, int64_t c,
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
__device__ __forceinline__ R load_tap(const Inputs& p, int64_t c, int64_t k) {
  return load_element<R>(p.weight.data, p.weight.dtype,
                         c * p.weight.stride[0] + tap_index(p, k) * p.weight.stride[1]);
}

// Before the activation, at time t of a run.
template <class R>
__device__ __forceinline__ R padded_pre(const Inputs& p, const Run& run, int64_t b, int64_t c,
                                        int64_t t) {
  R pre = load_bias<R>(p, c);
#pragma unroll 1
  for (int64_t k = 0; k < p.width; ++k) {
    pre += load_tap<R>(p, c, k) * padded_input<R>(p, run, b, c, t + k - p.left());
  }
  return pre;
}

template <class R>
__device__ __forceinline__ void padded_output(const FwdParams& p, int64_t b, int64_t c, int64_t t) {
  const Run run = run_at(p.sequences, b, t, p.width - 1, p.mode == Mode::kAnticausal);
  const bool padding = run.begin == run.end;
  const R y = padding ? R(0) : activate(padded_pre<R>(p, run, b, c, t), p.silu);
  store_element(p.y.data, p.y.dtype, b * p.y.stride[0] + c * p.y.stride[1] + t * p.y.stride[2], y);
}

// ---- for kernels of whole packs

// Taps in order of time, and bias, of kVec channels.
template <int kWidth, int kVec>
struct Taps {
  float w[kWidth][kVec], bias[kVec];

  __device__ __forceinline__ void load(const Inputs& p, int64_t channel) {
    with_device_type(p.weight.dtype, [&](auto* type) {  // once for all of them
      const auto* weight = static_cast<const std::remove_pointer_t<decltype(type)>*>(p.weight.data);
#pragma unroll
      for (int c = 0; c < kVec; ++c) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          w[k][c] = float(to_number(
              weight[(channel + c) * p.weight.stride[0] + tap_index(p, k) * p.weight.stride[1]]));
        }
      }
    });
#pragma unroll
    for (int c = 0; c < kVec; ++c) bias[c] = load_bias<float>(p, channel + c);
  }
};

// activate for all of x, which are on their way from and to T, behind one branch: the exponentials
// of several numbers run side by side.
template <class T, int kCount>
__device__ __forceinline__ void activate_all(float (&x)[kCount], bool use_silu) {
  if (!use_silu) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= sigmoid_for<T>(x[i]);
}

// d becomes activate_vjp(pre, d).
template <class T, int kCount>
__device__ __forceinline__ void activate_vjp_all(const float (&pre)[kCount], bool use_silu,
                                                 float (&d)[kCount]) {
  if (!use_silu) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] *= silu_slope(pre[i], sigmoid_for<T>(pre[i]));
}

// The run whose end is the final state of a slot: is it this one? Its slot, or -1.
__device__ __forceinline__ int64_t final_slot(const Sequences& s, const Run& run, int64_t b,
                                              bool last_first) {
  if (s.offsets) return run.slot;
  if (!s.ids) return b;
  if (s.ends == nullptr) return -1;
  return (last_first ? run.begin == s.ends[b].begin : run.end == s.ends[b].end) ? b : -1;
}

template <class F>
inline void with_fast_width(int64_t width, F&& f) {
  switch (width) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
  }
}

template <class F>
inline void with_fast_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat16: return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat64: return;
  }
}

inline bool starts_aligned(const View<3>& x, int64_t pack) {
  return reinterpret_cast<uintptr_t>(x.data) % (pack * element_bytes(x.dtype)) == 0 &&
         x.stride[0] % pack == 0 && x.stride[2] % pack == 0;
}

}  // namespace statescan::causal_conv1d::cuda
