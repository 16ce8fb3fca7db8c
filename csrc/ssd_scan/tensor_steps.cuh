// What the decays get from step to step within a piece: sums over the products V GL of steps s and
// outputs t, by the first 256 threads of a block. Four neighbouring threads share a row or a
// column.
#pragma once

#include "ssd_scan/tensor.cuh"

namespace statescan::ssd_scan::cuda {

struct StepProducts {
  static constexpr int kAcross = kSteps + 1;  // odd, so that rows and columns are without conflicts
  SharedArray<float, kSteps * kAcross> element;

  __device__ __forceinline__ float& at(int t, int s) { return element[t * kAcross + s]; }
};

// Calls f(row or column, the first of 16 of the others).
template <class F>
__device__ __forceinline__ void for_quarters(F&& f) {
  if (threadIdx.x < 4 * kSteps) f(int(threadIdx.x) / 4, int(threadIdx.x) % 4 * 16);
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The sum over t of column s, from step `first` on.
__device__ __forceinline__ float column_sum(StepProducts& products, int s, int begin, int first,
                                            int rows) {
  float sum = 0;
  for (int t = begin; t < begin + 16; ++t) {
    if (t >= first && t < rows) sum += products.at(t, s);
  }
  return quad_sum(sum);
}

// What the weights get through the outputs of the piece.
__device__ __forceinline__ void add_columns(StepProducts& products, int rows,
                                            DecaySums<float>& sums) {
  for_quarters([&](int s, int begin) {
    const float sum = column_sum(products, s, begin, s, rows);
    if (begin == 0) sums.d_weight[s] = sum;
  });
}

// The products become sums over the steps up to s, weighted. After add_columns and a barrier.
__device__ __forceinline__ void add_rows(StepProducts& products, int rows, Decays<float>& decays) {
  for_quarters([&](int t, int begin) {
    float sum = 0;
    for (int s = begin; s < begin + 16 && t < rows; ++s) {
      if (s > t) break;
      float& product = products.at(t, s);
      product = sum += product * decays.weight[s];
    }
    float before = 0;
    for (int q = 0; q < 3; ++q) {
      const float other = __shfl_sync(kAllLanes, sum, ptx::lane() / 4 * 4 + q);
      if (q < begin / 16) before += other;
    }
    for (int s = begin; s < begin + 16 && t < rows; ++s) {
      if (s <= t) products.at(t, s) += before;
    }
  });
}

// What goes from each step and those before to outputs after it. After add_rows and a barrier.
__device__ __forceinline__ void add_crossing(StepProducts& products, int rows, int shift,
                                             DecaySums<float>& sums) {
  for_quarters([&](int s, int begin) {
    const float sum = column_sum(products, s, begin, s + 1 + shift, rows);
    if (begin == 0) sums.through[s] = sum;
  });
}

// The sum over steps of a tile's product with another, for column i: to every thread of its four.
template <class Tile>
__device__ __forceinline__ float column_dot(Tile& x, Tile& y, int i, int begin, int rows) {
  float sum = 0;
  for (int t = begin; t < begin + 16 && t < rows; ++t) {
    sum += to_number(*x.at(t, i)) * to_number(*y.at(t, i));
  }
  return quad_sum(sum);
}

}  // namespace statescan::ssd_scan::cuda
