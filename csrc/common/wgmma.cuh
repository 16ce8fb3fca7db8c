// 16-bit tiles in shared memory as operands of a warpgroup's products, and what its threads hold of
// the sums. See ptx90.cuh for both.
#pragma once

#include "common/mma.cuh"
#include "common/ptx90.cuh"

namespace statescan {

// [row][column], in panels of 64 columns, each of them in the 128-byte swizzle.
template <int kRows, int kColumns>
struct SwizzledTile {
  static_assert(kRows % 8 == 0 && kColumns % 64 == 0);
  alignas(1024) SharedArray<uint4, kRows * kColumns / 8> packs;

  // 8 neighbours, from a multiple of 8 on.
  __device__ __forceinline__ uint4& pack(unsigned row, unsigned column) {
    return packs[int((column / 64 * kRows + row) * 8 + (column / 8 % 8 ^ row % 8))];
  }
  __device__ __forceinline__ BFloat16* at(unsigned row, unsigned column) {
    return reinterpret_cast<BFloat16*>(&pack(row, column)) + column % 8;
  }

  // Operands of depth 16: the first 64 rows, with the depth along columns; or the 64 columns of a
  // panel, with the depth along rows.
  __device__ __forceinline__ uint64_t rows(int depth) {
    return ptx::wgmma_operand(&packs[0], depth / 64 * kRows * 8 + depth % 64 / 8);
  }
  __device__ __forceinline__ uint64_t columns(int depth, int panel = 0) {
    return ptx::wgmma_operand(&packs[0], (panel * kRows + depth) * 8);
  }
};

// The warp's number in its warpgroup, found out anew at every call, as ptx::lane().
__device__ __forceinline__ int warp_of_group() {
  return int(unsigned(ptx::opaque(int(threadIdx.x))) / 32 % 4);
}

// Of the thread's sums: the first row among its warp's 16 (the other is 8 below), the first column
// (its neighbour follows, then those 8 further on and so forth).
__device__ __forceinline__ int fragment_row() { return int(unsigned(ptx::lane()) / 4); }
__device__ __forceinline__ int fragment_column() { return int(unsigned(ptx::lane()) % 4 * 2); }

// 64 x 64 sums of a warpgroup.
struct GroupProduct {
  float d[32];

  // f(row, column, number, the next column's) for the thread's numbers.
  template <class F>
  __device__ __forceinline__ void for_each_pair(F&& f) {
    const int row = 16 * warp_of_group() + fragment_row(), column = fragment_column();
#pragma unroll
    for (int i = 0; i < 32; i += 2) f(row + i % 4 / 2 * 8, column + i / 4 * 8, d[i], d[i + 1]);
  }
};

// For ptx::wgmma_fence and ptx::wgmma_wait.
__device__ __forceinline__ void keep(GroupProduct& x) { ptx::keep(x.d); }

// Columns of a tile from `first` on, with the depth along its rows, as the warp's left operand.
template <class Tile>
__device__ __forceinline__ Left left_of_columns(Tile& tile, int depth, int first) {
  const unsigned lane = unsigned(ptx::lane());
  Left x;
  ptx::ldmatrix_x4_trans(x.a,
                         &tile.pack(depth + lane % 8 + lane / 16 * 8, first + lane / 8 % 2 * 8));
  return x;
}

// Rounded and transposed: the sums' columns become the tile's rows from `first` on.
template <class Tile>
__device__ __forceinline__ void store_transposed(const GroupProduct& x, Tile& tile, int first) {
  const unsigned lane = unsigned(ptx::lane());
  const unsigned column = unsigned(16 * warp_of_group()) + lane / 8 % 2 * 8;
#pragma unroll
  for (int i = 0; i < 32; i += 8) {
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = ptx::pack_bf16(x.d[i + 2 * j], x.d[i + 2 * j + 1]);
    ptx::stmatrix_x4_trans(&tile.pack(first + 2 * i + lane / 16 * 8 + lane % 8, column), pairs);
  }
}

}  // namespace statescan
