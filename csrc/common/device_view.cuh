// Elements of any dtype, one at a time or 16 bytes at once, as numbers to compute with.
#pragma once

#include <type_traits>

#include "common/half.h"
#include "common/host_device.h"
#include "common/ptx.cuh"
#include "common/view.h"

namespace statescan {

__device__ __forceinline__ float to_number(float x) { return x; }
__device__ __forceinline__ double to_number(double x) { return x; }
__device__ __forceinline__ float to_number(BFloat16 x) { return to_float(x); }
__device__ __forceinline__ float to_number(Half x) { return ptx::f16_to_float(x.bits); }

template <class T>
__device__ __forceinline__ T from_number(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) return {uint16_t(ptx::pack_bf16(x, 0))};
  if constexpr (std::is_same_v<T, Half>) return {uint16_t(ptx::pack_f16(x, 0))};
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) return T(x);
}

// Calls f(null pointer of the storage type).
template <class F>
__device__ __forceinline__ void with_device_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat16: return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat64: return f(static_cast<double*>(nullptr));
  }
}

template <class R>
__device__ __forceinline__ R load_element(const void* data, DType dtype, int64_t offset) {
  R x{};
  with_device_type(dtype, [&](auto* type) {
    x = R(to_number(static_cast<const std::remove_pointer_t<decltype(type)>*>(data)[offset]));
  });
  return x;
}

// A double becomes a 16-bit number by way of float, as on the CPU.
template <class R>
__device__ __forceinline__ void store_element(void* data, DType dtype, int64_t offset, R x) {
  with_device_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, double>) {
      static_cast<T*>(data)[offset] = x;
    } else {
      static_cast<T*>(data)[offset] = from_number<T>(float(x));
    }
  });
}

// kCount neighbouring elements, as they are in global memory: 8 or 16 bytes, or one element at any address.
template <class T, int kCount>
struct Pack {
  static constexpr int kBytes = kCount * int(sizeof(T)), kWords = kBytes / 4;
  static_assert(kCount == 1 || kBytes == 8 || kBytes == 16);
  using Word = std::conditional_t<kBytes == 16, uint4, uint2>;
  std::conditional_t<kCount == 1, T, Word> bits;

  __device__ __forceinline__ static Pack load(const T* p) {
    if constexpr (kCount == 1) {
      return {*p};
    } else {
      return {*reinterpret_cast<const Word*>(p)};
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kCount == 1) {
      *p = bits;
    } else {
      ptx::store(reinterpret_cast<Word*>(p), bits);
    }
  }

  __device__ __forceinline__ void unpack(float (&x)[kCount]) const {
    if constexpr (kCount == 1) {
      x[0] = to_number(bits);
    } else {
      uint32_t words[4] = {bits.x, bits.y};
      if constexpr (kWords == 4) words[2] = bits.z, words[3] = bits.w;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if constexpr (sizeof(T) == 4) {
          x[i] = bits_to_float(words[i]);
        } else {
          x[2 * i] = to_number(T{uint16_t(words[i])});
          x[2 * i + 1] = to_number(T{uint16_t(words[i] >> 16)});
        }
      }
    }
  }
  __device__ __forceinline__ static Pack of(const float (&x)[kCount]) {
    if constexpr (kCount == 1) {
      return {from_number<T>(x[0])};
    } else {
      uint32_t words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if constexpr (sizeof(T) == 4) {
          words[i] = float_to_bits(x[i]);
        } else if constexpr (std::is_same_v<T, BFloat16>) {
          words[i] = ptx::pack_bf16(x[2 * i], x[2 * i + 1]);
        } else {
          words[i] = ptx::pack_f16(x[2 * i], x[2 * i + 1]);
        }
      }
      if constexpr (kWords == 4) return {uint4{words[0], words[1], words[2], words[3]}};
      if constexpr (kWords == 2) return {uint2{words[0], words[1]}};
    }
  }
};

template <class T>
inline constexpr int kPackSize = 16 / int(sizeof(T));

// Are the starts of lines of `numbers` numbers as aligned as loads of 8 or 16 bytes want them?
template <int kRank>
inline bool in_lines(const View<kRank>& v, int64_t numbers) {
  const int64_t bytes = element_bytes(v.dtype) * numbers;
  const int64_t unit = (bytes < 16 ? bytes : 16) / element_bytes(v.dtype);
  bool aligned = reinterpret_cast<uintptr_t>(v.data) % (unit * element_bytes(v.dtype)) == 0 &&
                 v.stride[kRank - 1] == 1;
  for (int i = 0; i + 1 < kRank; ++i) aligned = aligned && v.stride[i] % unit == 0;
  return aligned;
}

}  // namespace statescan
