// Products of any size by all threads of a block, for float and double: what the kernels are made
// of that do without tensor cores. Operands lie in scratch memory, shared or global, as
// [row][column] with an odd pitch, so that neither rows nor columns meet in a bank.
#pragma once

#include "ssd_scan/decays.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kPlainThreads = 256;

__device__ __forceinline__ int64_t pitch_of(int64_t columns) { return columns | 1; }

// Which k take part in element (i, j) of a product over k.
struct Every {
  int depth;
  __device__ __forceinline__ int begin(int) const { return 0; }
  __device__ __forceinline__ int end(int) const { return depth; }
  static constexpr bool kSame = true;  // for every row
};
struct UpTo {  // the first `before`, and k - before <= i - shift
  int before, shift;
  __device__ __forceinline__ int begin(int) const { return 0; }
  __device__ __forceinline__ int end(int i) const { return before + i + 1 - shift; }
  static constexpr bool kSame = false;
};
struct From {  // i + shift <= k < depth
  int depth, shift;
  __device__ __forceinline__ int begin(int i) const { return i + shift; }
  __device__ __forceinline__ int end(int) const { return depth; }
  static constexpr bool kSame = false;
};

// out[i][j] = kept out[i][j] + the sum over k of a(i, k) b(k, j). A thread takes 4 rows by 4
// columns, the latter far apart, so that neighbouring threads read neighbours. What takes no part
// is not added, lest a NaN spread.
template <class R, class Range, class A, class B>
__device__ __forceinline__ void product(int rows, int columns, Range range, A&& a, B&& b, R* out,
                                        int64_t pitch, R kept = 0) {
  constexpr int kM = 4, kN = 4;
  const int down = (rows + kM - 1) / kM, across = (columns + kN - 1) / kN;
#pragma unroll 1
  for (int tile = int(threadIdx.x); tile < down * across; tile += kPlainThreads) {
    const int i0 = tile / across * kM, j0 = tile % across;
    const int last = i0 + kM < rows ? i0 + kM - 1 : rows - 1;
    R sum[kM][kN] = {};
#pragma unroll 1
    for (int k = range.begin(i0); k < range.end(last); ++k) {
      R x[kM], y[kN];
#pragma unroll
      for (int m = 0; m < kM; ++m) x[m] = a(i0 + m < rows ? i0 + m : last, k);
#pragma unroll
      for (int n = 0; n < kN; ++n) y[n] = b(k, j0 + n * across < columns ? j0 + n * across : j0);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (!Range::kSame && (k < range.begin(i0 + m) || k >= range.end(i0 + m))) continue;
#pragma unroll
        for (int n = 0; n < kN; ++n) sum[m][n] += x[m] * y[n];
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int i = i0 + m, j = j0 + n * across;
        if (i >= rows || j >= columns) continue;
        R& result = out[i * pitch + j];
        result = kept != 0 ? kept * result + sum[m][n] : sum[m][n];
      }
    }
  }
}

// f(i, j) for every element, the columns side by side.
template <class F>
__device__ __forceinline__ void for_elements(int rows, int columns, F&& f) {
  for (int i = int(threadIdx.x); i < rows * columns; i += kPlainThreads)
    f(i / columns, i % columns);
}

template <class R>
__device__ __forceinline__ R load_at(const View<4>& x, int64_t i0, int64_t i1, int64_t i2,
                                     int64_t i3) {
  return load_element<R>(x.data, x.dtype,
                         i0 * x.stride[0] + i1 * x.stride[1] + i2 * x.stride[2] + i3 * x.stride[3]);
}
template <class R>
__device__ __forceinline__ void store_at(const View<4>& x, int64_t i0, int64_t i1, int64_t i2,
                                         int64_t i3, R value) {
  store_element(x.data, x.dtype,
                i0 * x.stride[0] + i1 * x.stride[1] + i2 * x.stride[2] + i3 * x.stride[3], value);
}

// to[i][j] = columns [first, first + columns) of a tensor (batch, seqlen, head or group, ...) at
// the piece's rows. With `shift`, row i holds step i - 1, which before a sequence is 0.
template <class R>
__device__ __forceinline__ void load_rows(const View<4>& x, const Piece& piece, int64_t head,
                                          int64_t first, int columns, int shift, R* to,
                                          int64_t pitch) {
  for_elements(piece.rows, columns, [&](int i, int j) {
    const bool there = i >= shift || !piece.first;
    to[i * pitch + j] =
        there ? load_at<R>(x, piece.b, piece.time(i, shift), head, first + j) : R(0);
  });
}

// D, which is there, of a head and an element of it.
template <class R>
__device__ __forceinline__ R skip_weight(const Inputs& p, int64_t head, int64_t i) {
  return load_element<R>(p.D.data, p.D.dtype, head * p.D.stride[0] + i * p.D.stride[1]);
}

// The gradient of y before the gate.
template <class R>
__device__ __forceinline__ R ungated(const Inputs& p, R dy, const Piece& piece, int row,
                                     int64_t head, int64_t i) {
  if (!p.z) return dy;
  return dy * silu(load_at<R>(p.z, piece.b, piece.time(row), head, i));
}

}  // namespace statescan::ssd_scan::cuda
