// 16-bit tiles in shared memory as operands of tensor cores: what each lane of a warp loads for a
// product of 16 rows by 16 columns over a depth of 16. See ptx.cuh for the fragments.
//
// A tile is [row][column] with a pitch of 8 more than a multiple of 16, so that the eight 16-byte
// rows of a matrix lie in different banks.
#pragma once

#include "common/half.h"
#include "common/ptx.cuh"
#include "common/shared.cuh"

namespace statescan {

inline constexpr int kTilePad = 8;

struct Left {  // rows by depth
  uint32_t a[4];
};
struct Right {  // depth by 16 columns, as two halves of 8
  uint32_t b[4];
};
struct Product {  // 16 rows by 16 columns, as two halves of 8; see at()
  float d[2][4] = {};

  // f(row, column, number) for the lane's eight numbers.
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) {
    const int lane = ptx::lane();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f(lane / 4 + i / 2 * 8, 8 * h + lane % 4 * 2 + i % 2, d[h][i]);
      }
    }
  }
};

// From a tile of [row][depth], or of [depth][row]. Who asks for many gives the lane: addresses then
// differ by constants.
__device__ __forceinline__ Left left_of(const BFloat16* tile, int pitch,
                                        unsigned lane = unsigned(ptx::lane())) {
  Left x;
  ptx::ldmatrix_x4(x.a, tile + lane % 16 * unsigned(pitch) + lane / 16 * 8);
  return x;
}
__device__ __forceinline__ Left left_of_transposed(const BFloat16* tile, int pitch,
                                                   unsigned lane = unsigned(ptx::lane())) {
  Left x;
  ptx::ldmatrix_x4_trans(x.a,
                         tile + (lane % 8 + lane / 16 * 8) * unsigned(pitch) + lane / 8 % 2 * 8);
  return x;
}

// From a tile of [depth][column], or of [column][depth].
__device__ __forceinline__ Right right_of(const BFloat16* tile, int pitch,
                                          unsigned lane = unsigned(ptx::lane())) {
  Right x;
  ptx::ldmatrix_x4_trans(x.b, tile + lane % 16 * unsigned(pitch) + lane / 16 * 8);
  return x;
}
__device__ __forceinline__ Right right_of_transposed(const BFloat16* tile, int pitch,
                                                     unsigned lane = unsigned(ptx::lane())) {
  Right x;
  ptx::ldmatrix_x4(x.b, tile + (lane % 8 + lane / 16 * 8) * unsigned(pitch) + lane / 8 % 2 * 8);
  return x;
}

// The same numbers as the other operand: rows by depth on the left is depth by rows on the right.
__device__ __forceinline__ Right transposed(const Left& x) {
  return {{x.a[0], x.a[2], x.a[1], x.a[3]}};
}
__device__ __forceinline__ Left transposed(const Right& x) {
  return {{x.b[0], x.b[2], x.b[1], x.b[3]}};
}

// A product, rounded, as the left operand of another: the lanes hold what they need already.
__device__ __forceinline__ Left as_left(const Product& x) {
  return {{ptx::pack_bf16(x.d[0][0], x.d[0][1]), ptx::pack_bf16(x.d[0][2], x.d[0][3]),
           ptx::pack_bf16(x.d[1][0], x.d[1][1]), ptx::pack_bf16(x.d[1][2], x.d[1][3])}};
}

__device__ __forceinline__ void multiply(Product& sum, const Left& x, const Right& y) {
  const uint32_t halves[2][2] = {{y.b[0], y.b[1]}, {y.b[2], y.b[3]}};
  ptx::mma_16x8x16_bf16(sum.d[0], x.a, halves[0]);
  ptx::mma_16x8x16_bf16(sum.d[1], x.a, halves[1]);
}

// An operand as a sum, each term rounded to bfloat16 from what those before it leave of the number:
// 1, 2 and 3 terms hold 8, 16 and 24 bits, all of a bfloat16, float16 and float. The range is that
// of float, but terms below 2^-133 are 0; an infinity leaves NaN, being taken from itself.
template <class Operand, int kTerms>
struct Terms {
  Operand term[kTerms];
};

// of(i) is the i-th.
template <int kTerms, class Of>
__device__ __forceinline__ auto terms(Of&& of) {
  Terms<decltype(of(0)), kTerms> x;
#pragma unroll
  for (int i = 0; i < kTerms; ++i) x.term[i] = of(i);
  return x;
}

// Of a pair of numbers, `low` in the low halves.
template <int kTerms>
__device__ __forceinline__ Terms<uint32_t, kTerms> split(float low, float high) {
  return terms<kTerms>([&](int) {
    const uint32_t pair = ptx::pack_bf16(low, high);
    low -= bits_to_float(pair << 16), high -= bits_to_float(pair & 0xffff0000u);
    return pair;
  });
}
template <int kTerms>
__device__ __forceinline__ void unite(const Terms<uint32_t, kTerms>& x, float& low, float& high) {
  low = bits_to_float(x.term[kTerms - 1] << 16);
  high = bits_to_float(x.term[kTerms - 1] & 0xffff0000u);
#pragma unroll
  for (int i = kTerms - 2; i >= 0; --i) {
    low += bits_to_float(x.term[i] << 16), high += bits_to_float(x.term[i] & 0xffff0000u);
  }
}

template <int kTerms>
__device__ __forceinline__ Terms<Left, kTerms> left_terms(const Product& x) {
  Terms<Left, kTerms> left;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* pair = &x.d[i / 2][i % 2 * 2];
    const auto parts = split<kTerms>(pair[0], pair[1]);
#pragma unroll
    for (int j = 0; j < kTerms; ++j) left.term[j].a[i] = parts.term[j];
  }
  return left;
}

template <int kTerms, class Operand>
__device__ __forceinline__ auto transposed(const Terms<Operand, kTerms>& x) {
  return terms<kTerms>([&](int i) { return transposed(x.term[i]); });
}

// 1, 3 or 6 products of terms, the smallest first: those left out are as small as what the terms
// leave of a number.
template <int kTerms>
__device__ __forceinline__ void multiply(Product& sum, const Terms<Left, kTerms>& x,
                                         const Terms<Right, kTerms>& y) {
#pragma unroll
  for (int order = kTerms - 1; order >= 0; --order) {
#pragma unroll
    for (int i = 0; i <= order; ++i) multiply(sum, x.term[i], y.term[order - i]);
  }
}

// Rounded into a tile of [row][column].
__device__ __forceinline__ void store_rounded(const Product& x, BFloat16* tile, int pitch) {
  const int lane = ptx::lane();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      BFloat16* to = tile + (lane / 4 + i * 8) * pitch + 8 * h + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = ptx::pack_bf16(x.d[h][2 * i], x.d[h][2 * i + 1]);
    }
  }
}

}  // namespace statescan
