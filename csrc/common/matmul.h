// Small matrix products out of first- and second-level cache, as blocks of rows by vectors that
// stay in registers:
//
//   acc[i][j] += sum over k of a[i, k] * b[k, vector j]
//
// a is read one number at a time and broadcast, by any two strides, so a transposed operand costs
// nothing; b is read as whole vectors. Results wider than a block are walked by for_blocks. Padding
// is the caller's: rows up to a multiple of kMaxRows may be computed, and what is in them is
// nobody's.
//
// An operand element is a number, or a Pair: two bfloat16 that are neighbours in k, for the
// instruction that multiplies pairs and adds up in float32 at twice the rate.
#pragma once

#include <type_traits>

#include "common/simd.h"
#include "common/tile.h"

namespace statescan {
inline namespace STATESCAN_ISA {

struct Pair {
  uint16_t first, second;
};

template <class E>
inline constexpr int kDepth = std::is_same_v<E, Pair> ? 2 : 1;  // numbers of k in an element

inline constexpr int kMaxRows = 16;  // of any block

// Of a block as wide as kVectors: 16 sums in 32 registers, 8 in 16, enough to hide the latency of a
// multiply-add twice over, and powers of two, which divide a tile evenly. Measured (Zen 5): 4x4,
// 8x2 and 6x4 within 4 %, at 98 % of the peak.
template <int kVectors>
inline constexpr int kBlockRows = (STATESCAN_VECTOR_BYTES == 64 ? 16 : 8) / kVectors;
inline constexpr int kMaxVectors = STATESCAN_VECTOR_BYTES == 64 ? 4 : 2;

template <class R, int kM, int kN>
struct Block {
  Vec<R> at[kM][kN] = {};

  STATESCAN_INLINE void scale_rows(const R* by) {
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) at[i][j] *= by[i];
    }
  }

  STATESCAN_INLINE void scale(R by) {
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) at[i][j] *= by;
    }
  }

  // += the rows of `in`, each number times that of `by` in its column.
  STATESCAN_INLINE void add_scaled(const R* in, int64_t pitch, const R* by) {
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) {
        const int at_j = j * kLanes<R>;
        at[i][j] += load(in + i * pitch + at_j) * load(by + at_j);
      }
    }
  }

  STATESCAN_INLINE void load_from(const R* in, int64_t pitch) {
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) at[i][j] = load(in + i * pitch + j * kLanes<R>);
    }
  }

  STATESCAN_INLINE void store_to(R* out, int64_t pitch) const {
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) store(out + i * pitch + j * kLanes<R>, at[i][j]);
    }
  }
};

// Calls f(rows tag, vectors tag, first row, first vector) for blocks that cover rows x vectors.
template <int kWidest = kMaxVectors, class F>
STATESCAN_INLINE void for_blocks(int rows, int vectors, F&& f, int first_vector = 0) {
  int v = first_vector;
  constexpr int kM = kBlockRows<kWidest>;
  for (; v + kWidest <= vectors; v += kWidest) {
    for (int r = 0; r < rows; r += kM) {
      f(std::integral_constant<int, kM>{}, std::integral_constant<int, kWidest>{}, r, v);
    }
  }
  if constexpr (kWidest > 1) for_blocks<kWidest / 2>(rows, vectors, f, v);
}

// One step of k (of a pair of them).
template <class R, int kM, int kN>
STATESCAN_INLINE void multiply_step(Block<R, kM, kN>& acc, const R* a, int64_t a_row, const R* b,
                                    int first_row = 0) {
  Vec<R> v[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) v[j] = load(b + j * kLanes<R>);
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
    if (i < first_row) continue;
    const Vec<R> x = splat(a[i * a_row]);
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) acc.at[i][j] += x * v[j];
  }
}

#if defined(__AVX512BF16__)
template <int kM, int kN>
STATESCAN_INLINE void multiply_step(Block<float, kM, kN>& acc, const Pair* a, int64_t a_row,
                                    const Pair* b, int first_row = 0) {
  __m512i v[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) v[j] = _mm512_loadu_si512(b + j * kLanes<float>);
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
    if (i < first_row) continue;
    int32_t x;
    memcpy(&x, a + i * a_row, sizeof(x));
    const __m512i both = _mm512_set1_epi32(x);
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      acc.at[i][j] =
          (FloatVec)_mm512_dpbf16_ps((__m512)acc.at[i][j], (__m512bh)both, (__m512bh)v[j]);
    }
  }
}
#endif

// acc += a b over `steps` elements of k. Strides in elements: of a from row to row and from step to
// step, of b from step to step.
template <class R, class E, int kM, int kN>
STATESCAN_INLINE void multiply(Block<R, kM, kN>& acc, const E* a, int64_t a_row, int64_t a_step,
                               const E* b, int64_t b_step, int steps) {
  for (int k = 0; k < steps; ++k) {
    multiply_step(acc, a, a_row, b);
    a += a_step;
    b += b_step;
  }
}

// Where an operand of a product starts, and its strides in elements.
template <class E>
struct Factors {
  const E* a;
  int64_t a_row, a_step;
  const E* b;
  int64_t b_step;
};

// What is left of a product with a lower triangle once the t / kDepth elements before the block's
// first row t are done: row i of the block takes i + diagonal more numbers of k. What lies beyond
// them in a is not read, so nothing of it reaches a row, not even a NaN.
template <class R, int kM, int kN>
STATESCAN_INLINE void multiply_triangle(Block<R, kM, kN>& acc, const Factors<R>& left,
                                        const R* /*ends*/, const R* /*tile*/, int diagonal) {
  const R *a = left.a, *b = left.b;
  if (diagonal) {
    multiply_step(acc, a, left.a_row, b);
    a += left.a_step;
    b += left.b_step;
  }
#pragma GCC unroll 16
  for (int k = 0; k + 1 < kM; ++k) {
    multiply_step(acc, a + k * left.a_step, left.a_row, b + k * left.b_step, k + 1);
  }
}

#if defined(__AVX512BF16__)
template <int kDiagonal, int kM, int kN>
STATESCAN_INLINE void multiply_pair_triangle(Block<float, kM, kN>& acc, const Factors<Pair>& left,
                                             const float* ends, const float* tile) {
#pragma GCC unroll 8
  for (int k = 0; 2 * k + 2 - kDiagonal < kM; ++k) {
    multiply_step(acc, left.a + k * left.a_step, left.a_row, left.b + k * left.b_step,
                  2 * k + 2 - kDiagonal);
  }
#pragma GCC unroll 8
  for (int i = 1 - kDiagonal; i < kM; i += 2) {
    const FloatVec x = splat(ends[i]);
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      acc.at[i][j] += x * load(tile + (i + kDiagonal - 1) * left.b_step + j * kLanes<float>);
    }
  }
}

// Where the numbers of a row do not fill its pairs, ends[i] is its last one, and `tile` what the
// pairs of b were rounded from.
template <int kM, int kN>
STATESCAN_INLINE void multiply_triangle(Block<float, kM, kN>& acc, const Factors<Pair>& left,
                                        const float* ends, const float* tile, int diagonal) {
  if (diagonal) return multiply_pair_triangle<1>(acc, left, ends, tile);
  multiply_pair_triangle<0>(acc, left, ends, tile);
}
#endif

// ---- Operands from tiles of numbers: as they are, or rounded to pairs. `room` is written only
// then.

// k along the columns of the tile: (row, k) -> (row, k / kDepth), pitch / kDepth from row to row.
// k along its rows: (k, column) -> (k / kDepth, column). `rows` need not be even: a last row by
// itself is paired with zeros.
template <class E, class R>
STATESCAN_INLINE const E* paired_columns(const R* tile, [[maybe_unused]] int rows,
                                         [[maybe_unused]] int columns, [[maybe_unused]] int pitch,
                                         E* room) {
  if constexpr (std::is_same_v<E, R>) {
    return tile;
  } else {
#if defined(__AVX512BF16__)
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; c += 16) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(tile + r * pitch + c));
        memcpy(room + (r * pitch + c) / 2, &rounded, sizeof(rounded));
      }
    }
#endif
    return room;
  }
}

// k along the columns, from a tile that has it along its columns in rows that are wanted as
// columns: (row, k) -> (k / kDepth, row). `columns` is the operand that paired_columns made of the
// tile.
template <class R, class E>
STATESCAN_INLINE const E* transposed(const E* columns, int rows, int count, int pitch, E* out,
                                     int out_pitch) {
  // A pair is moved as the 32 bits it has.
  using Unit = std::conditional_t<std::is_same_v<E, R>, R, float>;
  static_assert(sizeof(Unit) == sizeof(E));
  constexpr DType type = sizeof(Unit) == 8 ? DType::kFloat64 : DType::kFloat32;
  const Plane from{const_cast<E*>(columns), type, pitch / kDepth<E>, 1};
  load_tile(from, rows, (count + kDepth<E> - 1) / kDepth<E>, reinterpret_cast<Unit*>(out),
            out_pitch);
  return out;
}

#if defined(__AVX512BF16__)
// Lane i of the result is the pair (first[i], second[i]).
STATESCAN_INLINE __m512i round_to_pairs(FloatVec first, FloatVec second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return _mm512_permutexvar_epi16(order, (__m512i)halves);
}
#endif

// The columns of one row, lanes [c, c + kLanes<R>).
template <class R, class E>
STATESCAN_INLINE void store_columns(E* row, int c, Vec<R> v) {
  if constexpr (std::is_same_v<E, R>) {
    store(row + c, v);
  } else {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    memcpy(row + c / 2, &rounded, sizeof(rounded));
#endif
  }
}

template <class E, class R>
STATESCAN_INLINE const E* paired_rows(const R* tile, [[maybe_unused]] int rows,
                                      [[maybe_unused]] int columns, [[maybe_unused]] int pitch,
                                      E* room) {
  if constexpr (std::is_same_v<E, R>) {
    return tile;
  } else {
#if defined(__AVX512BF16__)
    for (int r = 0; r < rows; r += 2) {
      const R* row = tile + r * pitch;
      for (int c = 0; c < columns; c += 16) {
        const FloatVec second = r + 1 < rows ? load(row + pitch + c) : FloatVec{};
        _mm512_storeu_si512(room + r / 2 * pitch + c, round_to_pairs(load(row + c), second));
      }
    }
#endif
    return room;
  }
}

// The same of rows each multiplied by a number of its own, which are always written.
template <class E, class R>
STATESCAN_INLINE const E* scaled_rows(const R* tile, const R* by, int rows, int columns, int pitch,
                                      E* room) {
  for (int r = 0; r < rows; r += kDepth<E>) {
    const R* row = tile + r * pitch;
    for (int c = 0; c < columns; c += kLanes<R>) {
      const Vec<R> scaled = load(row + c) * by[r];
      if constexpr (std::is_same_v<E, R>) {
        store(room + r * pitch + c, scaled);
      } else {
#if defined(__AVX512BF16__)
        const FloatVec second = r + 1 < rows ? load(row + pitch + c) * by[r + 1] : FloatVec{};
        _mm512_storeu_si512(room + r / 2 * pitch + c, round_to_pairs(scaled, second));
#endif
      }
    }
  }
  return room;
}

// A block as rows of pairs (k, column), from an even row on.
template <int kM, int kN, class R, class E>
STATESCAN_INLINE void store_paired_rows([[maybe_unused]] const Block<R, kM, kN>& block,
                                        [[maybe_unused]] E* out, [[maybe_unused]] int64_t pitch) {
#if defined(__AVX512BF16__)
  if constexpr (!std::is_same_v<E, R>) {
#pragma GCC unroll 8
    for (int i = 0; i < kM; i += 2) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) {
        _mm512_storeu_si512(out + i / 2 * pitch + j * kLanes<R>,
                            round_to_pairs(block.at[i][j], block.at[i + 1][j]));
      }
    }
  }
#endif
}

}  // namespace STATESCAN_ISA
}  // namespace statescan
