// Vectors of the instruction set that this file is being compiled for, by compiler extensions:
// arithmetic is written with ordinary operators, and the few things the extensions lack are here.
// Everything lies in a namespace of the instruction set, so that no two object files share code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "common/half.h"

#if defined(__AVX512F__)
#define STATESCAN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define STATESCAN_VECTOR_BYTES 32
#else
#define STATESCAN_VECTOR_BYTES 16
#endif

#define STATESCAN_INLINE inline __attribute__((always_inline))

namespace statescan {
inline namespace STATESCAN_ISA {

template <class T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kCount)));
};

// kLanes numbers of type R, one register.
template <class R>
inline constexpr int kLanes = STATESCAN_VECTOR_BYTES / int(sizeof(R));
template <class R>
using Vec = typename VectorOf<R, kLanes<R>>::type;

using FloatVec = Vec<float>;
using DoubleVec = Vec<double>;
using IntVec = VectorOf<int32_t, kLanes<float>>::type;

template <class R>
STATESCAN_INLINE Vec<R> splat(R x) {
  return x - Vec<R>{};
}

// Unaligned. The number of elements is that of the vector.
template <class V, class T>
STATESCAN_INLINE V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <class R>
STATESCAN_INLINE Vec<R> load(const R* p) {
  return load_as<Vec<R>>(p);
}

template <class R>
STATESCAN_INLINE void store(R* p, Vec<R> v) {
  memcpy(p, &v, sizeof(v));
}

// The first `count` lanes only.
template <class R>
STATESCAN_INLINE Vec<R> load_first(const R* p, int count) {
  if (count == kLanes<R>) return load(p);
  Vec<R> v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class R>
STATESCAN_INLINE void store_first(R* p, Vec<R> v, int count) {
  if (count == kLanes<R>) return store(p, v);
  for (int i = 0; i < count; ++i) p[i] = v[i];
}

// ---- Conversion to and from storage types, kLanes<R> elements at a time.

template <class R, class T>
STATESCAN_INLINE Vec<R> load_convert(const T* p) {
  if constexpr (std::is_same_v<T, R>) return load(p);
  if constexpr (std::is_same_v<R, float>) {
#if defined(__AVX512F__)  // left to itself, GCC widens 16 numbers in two halves
    if constexpr (std::is_same_v<T, BFloat16>) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
      return (FloatVec)_mm512_slli_epi32(wide, 16);
    }
#else
    if constexpr (std::is_same_v<T, BFloat16>) {
      using Bits = VectorOf<uint16_t, kLanes<float>>::type;
      using Wide = VectorOf<uint32_t, kLanes<float>>::type;
      return (FloatVec)(__builtin_convertvector(load_as<Bits>(p), Wide) << 16);
    }
#endif
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, Half>) {
      return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    }
#elif defined(__F16C__)
    if constexpr (std::is_same_v<T, Half>) {
      return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    }
#endif
  }
  Vec<R> v;
  for (int i = 0; i < kLanes<R>; ++i) v[i] = R(to_float(p[i]));
  return v;
}

#if defined(__AVX512F__)
// The upper 16 bits of each of 16 numbers, one after the other.
STATESCAN_INLINE __m512i upper_halves() {
  typedef int16_t Halves __attribute__((vector_size(64)));
  return (__m512i)Halves{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
}
#endif

template <class R, class T>
STATESCAN_INLINE void store_convert(T* p, Vec<R> v) {
  if constexpr (std::is_same_v<T, R>) return store(p, v);
  if constexpr (std::is_same_v<R, float>) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      using Wide = VectorOf<uint32_t, kLanes<float>>::type;
      const Wide bits = (Wide)v;
      const Wide rounded = bits + 0x7fff + (bits >> 16 & 1);
      const Wide quiet_nan = bits | 0x400000;
#if defined(__AVX512F__)
      const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
      const __m512i out = _mm512_mask_mov_epi32((__m512i)rounded, is_nan, (__m512i)quiet_nan);
      const __m512i halves = _mm512_permutexvar_epi16(upper_halves(), out);
      _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(halves));
#else
      using Bits = VectorOf<uint16_t, kLanes<float>>::type;
      const Bits out = __builtin_convertvector((v == v ? rounded : quiet_nan) >> 16, Bits);
      memcpy(p, &out, sizeof(out));
#endif
      return;
    }
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, Half>) {
      _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#elif defined(__F16C__)
    if constexpr (std::is_same_v<T, Half>) {
      _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
  }
  for (int i = 0; i < kLanes<R>; ++i) p[i] = from_float<T>(float(v[i]));
}

// ---- Moving lanes.

template <class V, int... kIndex>
STATESCAN_INLINE V shuffle(V a, V b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, decltype(a == b){kIndex...});
#endif
}

// Of the pairs of kBlock-long runs of a and b: the even runs of both, or the odd runs of both.
//   a = a0 a1 a2 a3, b = b0 b1 b2 b3, kBlock = 1: even -> a0 b0 a2 b2, odd -> a1 b1 a3 b3
template <int kBlock, bool kOdd, class V, int... kLane>
STATESCAN_INLINE V interleave(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane);
  return shuffle(a, b,
                 std::integer_sequence<int, ((kLane & kBlock) ? n + kLane - (kOdd ? 0 : kBlock)
                                                              : kLane + (kOdd ? kBlock : 0))...>{});
}

template <class R, int kBlock, bool kOdd>
STATESCAN_INLINE Vec<R> interleave(Vec<R> a, Vec<R> b) {
  return interleave<kBlock, kOdd>(a, b, std::make_integer_sequence<int, kLanes<R>>{});
}

template <class R, int kBlock = kLanes<R> / 2>
STATESCAN_INLINE void transpose(Vec<R>* v) {
  constexpr int n = kLanes<R>;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & kBlock) continue;
    const Vec<R> a = v[i], b = v[i + kBlock];
    v[i] = interleave<R, kBlock, false>(a, b);
    v[i + kBlock] = interleave<R, kBlock, true>(a, b);
  }
  if constexpr (kBlock > 1) transpose<R, kBlock / 2>(v);
}

// Lane i of the result is the sum of the lanes of v[i], i < kLanes, always added in the same order.
// Overwrites v.
template <class R, int kBlock = kLanes<R> / 2>
STATESCAN_INLINE Vec<R> sum_lanes(Vec<R>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kBlock; ++i) {
    v[i] = interleave<R, kBlock, false>(v[i], v[i + kBlock]) +
           interleave<R, kBlock, true>(v[i], v[i + kBlock]);
  }
  if constexpr (kBlock > 1) return sum_lanes<R, kBlock / 2>(v);
  return v[0];
}

// Lane i of the result is lane i ^ kBlock of v.
template <int kBlock, class V, int... kLane>
STATESCAN_INLINE V exchange(V v, std::integer_sequence<int, kLane...>) {
  return shuffle(v, v, std::integer_sequence<int, (kLane ^ kBlock)...>{});
}

// The sum of the lanes, halves first: log2(kLanes) additions that wait for one another.
template <class R, int kBlock = kLanes<R> / 2>
STATESCAN_INLINE R sum_lanes_of(Vec<R> v) {
  v += exchange<kBlock>(v, std::make_integer_sequence<int, kLanes<R>>{});
  if constexpr (kBlock > 1) return sum_lanes_of<R, kBlock / 2>(v);
  return v[0];
}

}  // namespace STATESCAN_ISA
}  // namespace statescan
