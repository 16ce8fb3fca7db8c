// The mathematics of one number, for CUDA kernels: what vector_math.h is for vectors on the CPU.
// float: within about 2 units in the last place. double: the library, for gradient checks.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "common/ptx.cuh"

namespace statescan {

// e^x for x in [-105, 89], or NaN, by one ex2. x log2(e) is rounded before it is an exponent, which
// for large x alone would cost six bits; what was rounded off multiplies the result.
__device__ __forceinline__ float exp_within(float x) {
  constexpr float kLog2e = 1.44269504f, kLog2eLow = 1.92596303e-8f, kLn2 = 0.693147181f;
  const float exponent = x * kLog2e;
  const float rest = std::fma(x, kLog2eLow, std::fma(x, kLog2e, -exponent));
  const float e = ptx::ex2(exponent);
  return std::fma(e, rest * kLn2, e);
}

// Beyond these bounds the result is 0 or infinity.
__device__ __forceinline__ float exp(float x) {
  return exp_within(ptx::at_most(ptx::at_least(x, -105.0f), 89.0f));
}
__device__ __forceinline__ double exp(double x) { return std::exp(x); }

// 2^x, exactly 1 at 0, so that a step of size 0 leaves a state as it is.
__device__ __forceinline__ float exp2(float x) { return ptx::ex2(x); }
__device__ __forceinline__ double exp2(double x) { return std::exp2(x); }

// log(1 + s) / s for s in [0, 1]; coefficients of vector_math.h.
__device__ __forceinline__ float log1p_over(float s) {
  float p = std::fma(0.0053648185f, s, -0.03006577f);
  p = std::fma(p, s, 0.0792045f);
  p = std::fma(p, s, -0.13753799f);
  p = std::fma(p, s, 0.19153653f);
  p = std::fma(p, s, -0.24857163f);
  p = std::fma(p, s, 0.33321324f);
  p = std::fma(p, s, -0.49999648f);
  return std::fma(p, s, 1.0f);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), linear above 20, where the two agree in float; and
// its derivative sigmoid(x), of the same power.
__device__ __forceinline__ float softplus(float x, float& slope) {
  const float e = exp_within(ptx::at_least(-std::fabs(x), -105.0f)), r = ptx::rcp(1.0f + e);
  slope = x < 0 ? e * r : r;
  return std::fma(e, log1p_over(e), ptx::at_least(x, 0.0f));
}
__device__ __forceinline__ double softplus(double x, double& slope) {
  const double e = std::exp(-std::fabs(x));
  slope = (x < 0 ? e : 1) / (1 + e);
  return (x < 0 ? 0 : x) + std::log1p(e);
}
// log2(1 + 2^x), for what has 16 bits: one ex2 and 8 more instructions. Within 1.5e-6 of the result,
// however small it is. slope: the derivative, which is also that of softplus at x ln 2.
__device__ __forceinline__ float softplus_base2(float x, float& slope) {
  const float e = ptx::ex2(-std::fabs(x)), r = ptx::rcp(1.0f + e);
  slope = x < 0 ? e * r : r;
  float p = std::fma(0.020401182f, e, -0.095797537f);  // log2(1 + e) / e for e in [0, 1]
  p = std::fma(p, e, 0.21528453f);
  p = std::fma(p, e, -0.33908902f);
  p = std::fma(p, e, 0.47766838f);
  p = std::fma(p, e, -0.72115944f);
  p = std::fma(p, e, 1.4426932f);
  return std::fma(e, p, ptx::at_least(x, 0.0f));
}

template <class R>
__device__ __forceinline__ R softplus(R x) {
  R slope;
  return softplus(x, slope);
}

// e^87 keeps the reciprocal normal; sigmoid(-87) is 2e-38 and x sigmoid(x) no better than 0.
__device__ __forceinline__ float sigmoid(float x) {
  return ptx::rcp(1.0f + exp_within(ptx::at_most(ptx::at_least(-x, -105.0f), 87.0f)));
}
// The same for what is read from and written to T. Of 16 bits: 6 instructions less, for an error of
// up to |x| 2^-24 of the result.
template <class T>
__device__ __forceinline__ float sigmoid_for(float x) {
  if constexpr (sizeof(T) == 2) return ptx::rcp(1.0f + ptx::ex2(x * -1.44269504f));
  return sigmoid(x);
}
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class R>
__device__ __forceinline__ R silu(R x) {
  return x * sigmoid(x);
}

// d silu / dx, where s = sigmoid(x).
template <class R>
__device__ __forceinline__ R silu_slope(R x, R s) {
  return s * (1 + x * (1 - s));
}

}  // namespace statescan
