// Sums on their way to memory.
#pragma once

#include <type_traits>

#include "common/device_view.cuh"
#include "common/view.h"

namespace statescan::route_gather::cuda {

template <class T>
STATESCAN_HOST_DEVICE constexpr DType dtype_of() {
  if (std::is_same_v<T, Half>) return DType::kFloat16;
  return std::is_same_v<T, BFloat16> ? DType::kBFloat16 : DType::kFloat32;
}

// 16 bytes at a time by ptx::store_streaming: of an assignment the compiler at times makes four stores.
// kCount neighbours of the result, from `at` on. `packed`: the address allows 16 bytes at a time.
template <class T, int kCount>
__device__ __forceinline__ void store_result(const View<4>& out, int64_t at, bool packed,
                                             const float (&x)[kCount]) {
  if constexpr (kCount > 1) {
    if (packed && out.dtype == DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const float four[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
        ptx::store_streaming(reinterpret_cast<uint4*>(static_cast<float*>(out.data) + at + i),
                             Pack<float, 4>::of(four).bits);
      }
      return;
    }
    if constexpr (sizeof(T) == 2) {
      if (packed && out.dtype == dtype_of<T>()) {
        return ptx::store_streaming(reinterpret_cast<uint4*>(static_cast<T*>(out.data) + at),
                                    Pack<T, kCount>::of(x).bits);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) store_element(out.data, out.dtype, at + i, x[i]);
}

}  // namespace statescan::route_gather::cuda
