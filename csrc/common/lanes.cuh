// What kernels that share out work to lanes and warps have in common.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace statescan {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// kCount neighbours in shared memory, moved at once, or four at a time.
template <class R, int kCount>
struct alignas(sizeof(R) * (kCount < 4 ? kCount : 4)) Several {
  R x[kCount];
};
template <int kCount, class R>
__device__ __forceinline__ Several<R, kCount>& several(R& first) {
  return reinterpret_cast<Several<R, kCount>&>(first);
}

// Whether rows that begin at p, `stride` apart, can be read `count` elements at a time.
template <class T>
__device__ __forceinline__ bool is_aligned(const T* p, int64_t stride, int count) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * count) == 0 && stride % count == 0;
}

template <class R>
__device__ __forceinline__ R sum_over_warp(R x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// Four sums over a warp for little more than one: lane 8 i gets that of v[i].
template <class R>
__device__ __forceinline__ R sum_four_over_warp(const R (&v)[4], int lane) {
  const bool upper = lane & 16, odd = lane & 8;
  R pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pair[i] = upper ? v[i + 2] : v[i];
    pair[i] += __shfl_xor_sync(kAllLanes, upper ? v[i] : v[i + 2], 16);
  }
  R sum = odd ? pair[1] : pair[0];
  sum += __shfl_xor_sync(kAllLanes, odd ? pair[0] : pair[1], 8);
#pragma unroll
  for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  return sum;
}

}  // namespace statescan
