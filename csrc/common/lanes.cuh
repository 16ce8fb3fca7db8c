// What kernels that share out work to lanes and warps have in common.
#pragma once

#include <cstdint>

#include "common/cuda.h"

namespace statescan {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// kCount neighbours in shared memory, moved at once, or four at a time.
template <class R, int kCount>
struct alignas(sizeof(R) * (kCount < 4 ? kCount : 4)) Several {
  R x[kCount];
};
template <int kCount, class R>
__device__ __forceinline__ Several<R, kCount>& several(R& first) {
#if defined(STATESCAN_SIMT)
  simt::check_aligned(&first, alignof(Several<R, kCount>));
#endif
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

// kCount sums over a warp, a power of two, for little more than one: lane 32 / kCount i gets that of
// v[i], and v is used up. With kApart, over lanes that are so far apart: lane 32 / kCount i + l gets
// that of the lanes l, l + kApart, ..
template <int kCount, int kApart = 1, int kLanes = 32, int kSize, class R>
__device__ __forceinline__ R sums_over_warp(R (&v)[kSize], int lane) {
  if constexpr (kLanes > kApart) {
    constexpr int kHalf = kCount / 2;
    if constexpr (kCount == 1) v[0] += __shfl_xor_sync(kAllLanes, v[0], kLanes / 2);
    const bool upper = lane & kLanes / 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const R given = upper ? v[i] : v[i + kHalf];
      v[i] = (upper ? v[i + kHalf] : v[i]) + __shfl_xor_sync(kAllLanes, given, kLanes / 2);
    }
    return sums_over_warp<(kCount > 1 ? kHalf : 1), kApart, kLanes / 2>(v, lane);
  }
  return v[0];
}

}  // namespace statescan
