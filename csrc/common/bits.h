// Moving elements without regard to what they are: as integers of their size, in lanes that can be
// transposed. 16-bit elements travel in pairs, or alone in lanes twice as wide.
#pragma once

#include "common/simd.h"
#include "common/view.h"

namespace statescan {
inline namespace STATESCAN_ISA {

template <class E>
using Lane = std::conditional_t<sizeof(E) == 8, uint64_t, uint32_t>;

// Calls f with a null pointer to an integer of the element's size.
template <class F>
STATESCAN_INLINE void with_bits(DType dtype, F&& f) {
  switch (element_bytes(dtype)) {
    case 2: return f((uint16_t*)nullptr);
    case 4: return f((uint32_t*)nullptr);
    default: return f((uint64_t*)nullptr);
  }
}

// kLanes<Lane<E>> elements, each in a lane.
template <class E>
STATESCAN_INLINE Vec<Lane<E>> load_bits(const E* p) {
  if constexpr (sizeof(E) == 2) {
    using Narrow = typename VectorOf<uint16_t, kLanes<uint32_t>>::type;
    return __builtin_convertvector(load_as<Narrow>(p), Vec<uint32_t>);
  } else {
    return load(p);
  }
}

// The low 16 bits of each lane, if elements have 16.
template <class E>
STATESCAN_INLINE void store_bits(E* p, Vec<Lane<E>> v) {
  if constexpr (sizeof(E) == 2) {
    using Narrow = typename VectorOf<uint16_t, kLanes<uint32_t>>::type;
    const Narrow narrow = __builtin_convertvector(v, Narrow);
    memcpy(p, &narrow, sizeof(narrow));
  } else {
    store(p, v);
  }
}

// One register put together from pieces of 16 bytes, piece(i) being a pointer to the i-th.
template <class V, class Piece>
STATESCAN_INLINE V load_pieces(Piece&& piece) {
#if defined(__AVX512F__)
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)piece(0)));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)piece(1)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)piece(2)), 2);
  return (V)_mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)piece(3)), 3);
#elif defined(__AVX2__)
  const __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)piece(0)));
  return (V)_mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i*)piece(1)), 1);
#else
  return load_as<V>(piece(0));
#endif
}

// Lane i of v[j] is the j-th element of row(i): a transposition of which all but the last two steps
// (or one, in float64) cost nothing but loads, of more and smaller pieces.
template <class R, class Row>
STATESCAN_INLINE void load_transposed(Row&& row, Vec<R>* v) {
  constexpr int n = kLanes<R>, part = 16 / int(sizeof(R));
#pragma GCC unroll 16
  for (int j = 0; j < n; ++j) {
    v[j] = load_pieces<Vec<R>>([&](int i) {
      return reinterpret_cast<const R*>(row(i * part + j % part)) + j / part * part;
    });
  }
  transpose<R, part / 2>(v);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan
