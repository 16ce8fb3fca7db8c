// What a warp knows of its channel on a route, and how its lanes put their steps together.
#pragma once

#include "common/device_view.cuh"
#include "common/scalar.cuh"
#include "selective_scan_2d/planes.cuh"
#include "selective_scan_2d/rows.cuh"

#include "selective_scan/equations.h"

namespace statescan::selective_scan_2d::cuda {

using selective_scan::decay;

inline constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// a h + b; where a is 0 the state starts anew, whatever h is.
template <class C>
__device__ __forceinline__ typename C::R advance(typename C::R a, typename C::R h,
                                                 typename C::R b) {
  return !C::kFast && a == 0 ? b : a * h + b;
}

// The value that a lane's own map h -> a h + b starts from, where the lanes before it (kBack: after it)
// come first and the first of them starts from h.
template <class C, bool kBack>
__device__ __forceinline__ typename C::R enter(typename C::R a, typename C::R b, typename C::R h,
                                               int lane) {
  using R = typename C::R;
  auto from = [](R x, int lanes) {
    return kBack ? __shfl_down_sync(kAllLanes, x, lanes) : __shfl_up_sync(kAllLanes, x, lanes);
  };
  const int before = kBack ? 31 - lane : lane;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const R a0 = from(a, lanes), b0 = from(b, lanes);
    if (before >= lanes) {
      b = advance<C>(a, b0, b);
      a *= a0;
    }
  }
  a = from(a, 1), b = from(b, 1);
  return before == 0 ? h : advance<C>(a, h, b);
}

template <class R>
__device__ __forceinline__ R parameter(const View<2>& x, int64_t route, int64_t channel, R absent,
                                       int64_t repeat = 1) {
  if (!x) return absent;
  if (repeat > 1) channel /= repeat;
  return load_element<R>(x.data, x.dtype, route * x.stride[0] + channel * x.stride[1]);
}

template <class R>
struct Parameters {
  R D, bias, weight;
  __device__ __forceinline__ Parameters(const Inputs& p, int64_t route, int64_t channel)
      : D(parameter<R>(p.D, route, channel, 0)),
        bias(parameter<R>(p.delta_bias, route, channel, 0, p.delta_repeat)),
        weight(parameter<R>(p.weights, route, channel, 1)) {}
};

// table[i pitch] = scale x[route, channel, i], by the lanes of a warp.
template <class R>
__device__ __forceinline__ void load_table(const View<3>& x, int64_t route, int64_t channel,
                                           int64_t count, R scale, int lane, R* table,
                                           int pitch = 1) {
#pragma unroll 1
  for (int64_t i = lane; i < count; i += 32) {
    table[i * pitch] =
        scale * load_element<R>(x.data, x.dtype,
                                route * x.stride[0] + channel * x.stride[1] + i * x.stride[2]);
  }
}
__device__ __forceinline__ int64_t state_offset(const View<4>& x, int64_t b, int64_t route,
                                                int64_t channel) {
  return b * x.stride[0] + route * x.stride[1] + channel * x.stride[2];
}
// The states of a channel, by the lanes of a warp; zero without `x`.
template <class R>
__device__ __forceinline__ void load_states(const View<4>& x, int64_t b, int64_t route,
                                            int64_t channel, int64_t count, int lane, R* h) {
  const int64_t first = state_offset(x, b, route, channel);
#pragma unroll 1
  for (int64_t n = lane; n < count; n += 32) {
    h[n] = x ? load_element<R>(x.data, x.dtype, first + n * x.stride[3]) : R(0);
  }
}
template <class R>
__device__ __forceinline__ void store_states(const View<4>& x, int64_t b, int64_t route,
                                             int64_t channel, int64_t count, int lane, const R* h) {
  const int64_t first = state_offset(x, b, route, channel);
#pragma unroll 1
  for (int64_t n = lane; n < count; n += 32) {
    store_element(x.data, x.dtype, first + n * x.stride[3], h[n]);
  }
}

}  // namespace statescan::selective_scan_2d::cuda
