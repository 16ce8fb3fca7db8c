// What the decays get from step to step within a piece. With W = V GL and M = W w, of outputs t and
// steps s,
//
//   d_weight[s] = sum of W[t, s] over t
//   through[s] = sum of M[t, s'] over t > s and s' <= s, with t - 1 for t if the output is shifted
//
// The warps that have blocks of 16 x 16 of W leave sums over their columns and rows, and one warp
// adds them up: what crosses a step is what does so within its own block on the diagonal, then
// columns up to it in the blocks below, then rows after it in the blocks to the left. Nothing is
// subtracted.
#pragma once

#include "ssd_scan/tensor.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kBlocks = kSteps / 16;

struct BlockSums {
  SharedArray<float, kBlocks * kSteps> columns;  // [block of t][s], of W
  SharedArray<float, kBlocks * kSteps> rows;     // [block of s][t], of M
  SharedArray<float, kSteps> within;             // through[s] of the block on the diagonal
};

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The sums of a product's columns: of column summed_column() to each lane.
__device__ __forceinline__ float column_sums(const Product& x) {
  float both[4] = {x.d[0][0] + x.d[0][2], x.d[0][1] + x.d[0][3], x.d[1][0] + x.d[1][2],
                   x.d[1][1] + x.d[1][3]};
  return sums_over_warp<4, 4>(both, ptx::lane());
}
__device__ __forceinline__ int summed_column() {
  const int lane = ptx::lane();
  return lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2;
}

// f(i, number) for the lane's numbers on a product's diagonal.
template <class F>
__device__ __forceinline__ void for_diagonal(const Product& x, F&& f) {
  const int row = ptx::lane() / 4, beside = row - ptx::lane() % 4 * 2;
  if (beside != 0 && beside != 1) return;
  f(row, beside ? x.d[0][1] : x.d[0][0]);
  f(row + 8, beside ? x.d[1][3] : x.d[1][2]);
}

// 1 where the row is not after the column: a product with it has sums along the rows.
__device__ __forceinline__ Right ones_up_to_column() {
  const int row = ptx::lane() % 4 * 2, column = ptx::lane() / 4;
  const uint32_t diagonal = (row <= column ? 0x3f80u : 0) | (row < column ? 0x3f800000u : 0);
  return {{diagonal, 0, 0x3f803f80u, diagonal}};
}

// By the warp that has block (t, s) of W.
template <int kTerms>
__device__ __forceinline__ void sum_block(const Product& W, Decays<float>& d, int t, int s,
                                          int shift, BlockSums& sums) {
  Product M = W, along;
  M.for_each([&](int, int column, float& m) { m *= d.weight[16 * s + column]; });
  constexpr int kOwnTerms = kTerms < 3 ? kTerms + 1 : 3;  // the sums are not rounded like factors
  const Terms<Left, kOwnTerms> left = left_terms<kOwnTerms>(M);
#pragma unroll
  for (int i = kOwnTerms - 1; i >= 0; --i) multiply(along, left.term[i], ones_up_to_column());
  if (ptx::lane() % 4 == 3) {  // has the last column
    const int at = s * kSteps + 16 * t + ptx::lane() / 4;
    sums.rows[at] = along.d[1][1], sums.rows[at + 8] = along.d[1][3];
  }
  const float column = column_sums(W);
  const bool writes = (ptx::lane() & 4) == 0;
  if (writes) sums.columns[t * kSteps + 16 * s + summed_column()] = column;
  if (t != s) return;
  along.for_each([&](int row, int column, float& x) { x = row > column + shift ? x : 0.0f; });
  const float crossing = column_sums(along);
  if (writes) sums.within[16 * s + summed_column()] = crossing;
}

// By one warp, into d_weight and through. Lane l has steps 2 l and 2 l + 1.
__device__ __forceinline__ void add_blocks(BlockSums& sums, Decays<float>& d, int rows, int shift,
                                           DecaySums<float>& to) {
  const int lane = ptx::lane(), block = lane / 8;
  float below[2] = {}, crossing[2] = {};
  if (16 * block < rows) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int s = 2 * lane + e;
      float sum = 0;
      for (int t = block + 1; 16 * t < rows; ++t) sum += sums.columns[t * kSteps + s];
      to.d_weight[s] = sum + sums.columns[block * kSteps + s];
      below[e] = d.weight[s] * sum;
      crossing[e] = sums.within[s];
    }
  }
  float before = 0;  // of the block's steps in lanes before
  const float own = below[0] + below[1];
#pragma unroll
  for (int by = 1; by < 8; ++by) {
    const float other = __shfl_up_sync(kAllLanes, own, by);
    if (lane % 8 >= by) before += other;
  }
  crossing[0] += before + below[0], crossing[1] += before + own;
  // What crosses a block's last step is all of it to the left: also when the output is shifted,
  // where the first output below the block is not after that step.
  const bool is_last = lane % 8 == 7;
  if (is_last) crossing[1] = 0;
#pragma unroll
  for (int count = 1; count < kBlocks; ++count) {
    float row[2] = {};  // of the first `count` blocks of steps
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int t = 2 * lane + e + shift;
#pragma unroll
      for (int s = 0; s < count; ++s) {
        if (t < rows && s <= t / 16) row[e] += sums.rows[s * kSteps + t];
      }
    }
    float after = __shfl_down_sync(kAllLanes, running_sum<true>(row[0] + row[1], lane), 1);
    if (lane == 31) after = 0;
    if (block == count) crossing[0] += row[1] + after;
    if (block + is_last == count) crossing[1] += after;
  }
  to.through[2 * lane] = crossing[0], to.through[2 * lane + 1] = crossing[1];
}

}  // namespace statescan::ssd_scan::cuda
