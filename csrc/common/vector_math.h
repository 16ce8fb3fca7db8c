// exp2, exp, log1p, softplus, sigmoid and silu of whole vectors, each followed by its derivative.
// float: polynomials, within about 1.5 units in the last place; exact where exactness matters
// (exp2(0) = 1, so that a step of size 0 leaves a state as it is). double: the C library, lane by
// lane, for gradient checks.
#pragma once

#include "common/simd.h"

namespace statescan {
inline namespace STATESCAN_ISA {

// max(x, low) and min(x, high), where NaN stays NaN. One instruction each: the compiler would make a
// comparison and a blend, by way of a mask register.
STATESCAN_INLINE FloatVec at_least(FloatVec x, float low) {
  const FloatVec l = splat(low);
#if defined(__AVX512F__)
  return (FloatVec)_mm512_max_ps((__m512)l, (__m512)x);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_max_ps((__m256)l, (__m256)x);
#elif defined(__SSE2__)
  return (FloatVec)_mm_max_ps((__m128)l, (__m128)x);
#else
  return x < l ? l : x;
#endif
}

STATESCAN_INLINE FloatVec at_most(FloatVec x, float high) {
  const FloatVec h = splat(high);
#if defined(__AVX512F__)
  return (FloatVec)_mm512_min_ps((__m512)h, (__m512)x);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_min_ps((__m256)h, (__m256)x);
#elif defined(__SSE2__)
  return (FloatVec)_mm_min_ps((__m128)h, (__m128)x);
#else
  return x > h ? h : x;
#endif
}

// x is in [-1/2, 1/2] after the nearest whole number has been taken off. Coefficients by
// iteratively reweighted least squares on the relative error, constant term held at 1: 9e-8.
STATESCAN_INLINE FloatVec exp2_fraction(FloatVec x) {
  FloatVec p = splat(0.00132647273f);
  p = p * x + 0.00967151299f;
  p = p * x + 0.0555073358f;
  p = p * x + 0.240222424f;
  p = p * x + 0.693147004f;
  return p * x + 1.0f;
}

#if defined(__AVX512F__)

STATESCAN_INLINE FloatVec nearest(FloatVec x) {
  return (FloatVec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// p * 2^n for whole n: overflows to infinity, underflows to 0 through the subnormals, keeps NaN.
STATESCAN_INLINE FloatVec scale_by_exp2(FloatVec p, FloatVec n) {
  return (FloatVec)_mm512_scalef_ps((__m512)p, (__m512)n);
}

#else

// Adding 1.5 * 2^23 leaves the whole number in the low bits of the sum, rounded to nearest even.
// Beyond +-2^22 the result is wrong but whole, which is all scale_by_exp2 needs of it.
STATESCAN_INLINE FloatVec nearest(FloatVec x) { return (x + 12582912.0f) - 12582912.0f; }

// As above, but what is below 2^-125 becomes 0. The exponent is made one too small and p twice as
// large, so that 2^128 needs no second step.
STATESCAN_INLINE FloatVec scale_by_exp2(FloatVec p, FloatVec n) {
  const FloatVec in_range = at_most(at_least(n, -126.0f), 129.0f);
  const IntVec exponent = __builtin_convertvector(in_range, IntVec) + 126;
  return (p + p) * (FloatVec)(exponent << 23);
}

#endif

STATESCAN_INLINE FloatVec exp2(FloatVec x) {
  const FloatVec n = nearest(x);
  return scale_by_exp2(exp2_fraction(x - n), n);
}

// x - n ln 2 in units of ln 2, where n is the whole number nearest to it.
STATESCAN_INLINE FloatVec fraction_of_ln2(FloatVec x, FloatVec n) {
#if defined(__AVX512F__)  // exact products, so 1 / ln 2 in two parts is enough
  const FloatVec r = (FloatVec)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(1.44269502f), (__m512)n);
  return r + x * 1.92596303e-08f;
#elif defined(__FMA__)
  const FloatVec r = (FloatVec)_mm256_fmsub_ps((__m256)x, _mm256_set1_ps(1.44269502f), (__m256)n);
  return r + x * 1.92596303e-08f;
#else  // ln 2 in two parts, the first with room for exact products
  return (x - n * 0.693145752f - n * 1.42860677e-06f) * 1.44269502f;
#endif
}

// x in [-105, 90], or NaN: far outside, the fraction would no longer be small.
STATESCAN_INLINE FloatVec exp_within(FloatVec x) {
  const FloatVec n = nearest(x * 1.44269502f);
  return scale_by_exp2(exp2_fraction(fraction_of_ln2(x, n)), n);
}

// Beyond these bounds the result is 0 or infinity.
STATESCAN_INLINE FloatVec exp(FloatVec x) {
  return exp_within(at_most(at_least(x, -105.0f), 90.0f));
}

// 1 / x for normal x whose reciprocal is normal. A division occupies the divider for ten cycles and
// more; where there is an estimate of 14 bits, one Newton step makes it 27.
STATESCAN_INLINE FloatVec reciprocal(FloatVec x) {
#if defined(__AVX512F__)
  const FloatVec r = (FloatVec)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// log(1 + s) / s for s in [0, 1]. Coefficients as above: 3e-8. No longer than log(1 + s) by way of
// 2 atanh(s / (2 + s)), whose division takes the place of five multiply-adds.
STATESCAN_INLINE FloatVec log1p_over(FloatVec s) {
  FloatVec p = splat(0.0053648185f);
  p = p * s - 0.03006577f;
  p = p * s + 0.0792045f;
  p = p * s - 0.13753799f;
  p = p * s + 0.19153653f;
  p = p * s - 0.24857163f;
  p = p * s + 0.33321324f;
  p = p * s - 0.49999648f;
  return p * s + 1.0f;
}

STATESCAN_INLINE FloatVec minus_abs(FloatVec x) { return (FloatVec)((IntVec)x | INT32_MIN); }

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|). Linear above 20, where the two agree in float.
STATESCAN_INLINE FloatVec softplus(FloatVec x) {
  const FloatVec e = exp_within(at_least(minus_abs(x), -105.0f));
  return e * log1p_over(e) + at_least(x, 0.0f);
}

// softplus(x), and its derivative: sigmoid(x), cut to 1 above 20; one exponential for both.
STATESCAN_INLINE FloatVec softplus(FloatVec x, FloatVec& slope) {
  const FloatVec e = exp_within(at_least(minus_abs(x), -105.0f)), r = reciprocal(1.0f + e);
  slope = x > 20.0f ? FloatVec{} + 1.0f : x < 0.0f ? e * r : r;
  return e * log1p_over(e) + at_least(x, 0.0f);
}

// e^87 keeps the reciprocal normal; sigmoid(-87) is 2e-38 and x sigmoid(x) no better than 0.
STATESCAN_INLINE FloatVec sigmoid(FloatVec x) {
  return reciprocal(1.0f + exp_within(at_most(at_least(-x, -105.0f), 87.0f)));
}

// ---- double

#define STATESCAN_EACH_LANE(expression)                         \
  DoubleVec y;                                                  \
  for (int i = 0; i < kLanes<double>; ++i) y[i] = (expression); \
  return y;

STATESCAN_INLINE DoubleVec exp2(DoubleVec x) { STATESCAN_EACH_LANE(std::exp2(x[i])) }
STATESCAN_INLINE DoubleVec exp(DoubleVec x) { STATESCAN_EACH_LANE(std::exp(x[i])) }
// torch's softplus, the reference, is linear above 20.
STATESCAN_INLINE DoubleVec softplus(DoubleVec x) {
  STATESCAN_EACH_LANE(x[i] > 20 ? x[i] : std::log1p(std::exp(x[i])))
}
STATESCAN_INLINE DoubleVec sigmoid(DoubleVec x) { STATESCAN_EACH_LANE(1 / (1 + std::exp(-x[i]))) }

STATESCAN_INLINE DoubleVec softplus(DoubleVec x, DoubleVec& slope) {
  slope = x > 20 ? DoubleVec{} + 1 : sigmoid(x);
  return softplus(x);
}

#undef STATESCAN_EACH_LANE

// ---- of both

template <class V>
STATESCAN_INLINE V silu(V x) {
  return x * sigmoid(x);
}

// d silu / dx, where s = sigmoid(x).
template <class V>
STATESCAN_INLINE V silu_slope(V x, V s) {
  return s * (1 + x * (1 - s));
}

}  // namespace STATESCAN_ISA
}  // namespace statescan
