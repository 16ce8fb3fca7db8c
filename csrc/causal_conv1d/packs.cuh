// Rows of a channel-first tensor in aligned packs of 16 bytes: packs are counted from the aligned
// address at or before a row, so that rows of any length and at any address are read in whole packs,
// but for their ends.
#pragma once

#include "common/device_view.cuh"

namespace statescan::causal_conv1d::cuda {

// How many elements p is beyond a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ int64_t misalignment(const T* p) {
  return int64_t(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// Elements t .. t + kPackSize - 1 of a row of n, with zeros outside of it. `aligned`: t is that of an
// aligned address.
template <class T>
__device__ __forceinline__ Pack<T, kPackSize<T>> load_pack(const T* row, int64_t t, int64_t n,
                                                           bool aligned) {
  constexpr int kVec = kPackSize<T>;
  if (aligned && t >= 0 && t + kVec <= n) return Pack<T, kVec>::load(row + t);
  uint32_t words[4] = {};
  if (t + kVec > 0 && t < n) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (t + i < 0 || t + i >= n) continue;
      if constexpr (sizeof(T) == 4) {
        words[i] = float_to_bits(row[t + i]);
      } else {
        words[i / 2] |= uint32_t(row[t + i].bits) << 16 * (i % 2);
      }
    }
  }
  return {uint4{words[0], words[1], words[2], words[3]}};
}

// A pack with the one before and the one after, as far as they are needed.
template <class T>
struct Neighbours {
  static constexpr int kVec = kPackSize<T>;
  Pack<T, kVec> before, own, after;

  __device__ __forceinline__ void load(const T* row, int64_t t, int64_t n, bool aligned,
                                       bool with_before, bool with_after) {
    if (with_before) before = load_pack(row, t - kVec, n, aligned);
    own = load_pack(row, t, n, aligned);
    if (with_after) after = load_pack(row, t + kVec, n, aligned);
  }

  // All of it there, and aligned.
  __device__ __forceinline__ void load_whole(const T* from, bool with_before, bool with_after) {
    own = Pack<T, kVec>::load(from);
    if (with_before) before = Pack<T, kVec>::load(from - kVec);
    if (with_after) after = Pack<T, kVec>::load(from + kVec);
  }

  // in[i] is the input at time t - kLeft + i.
  template <int kLeft, int kCount>
  __device__ __forceinline__ void unpack(float (&in)[kCount]) const {
    float near[kVec];
    if constexpr (kLeft > 0) {
      before.unpack(near);
#pragma unroll
      for (int i = 0; i < kLeft; ++i) in[i] = near[kVec - kLeft + i];
    }
    own.unpack(near);
#pragma unroll
    for (int i = 0; i < kVec; ++i) in[kLeft + i] = near[i];
    if constexpr (kLeft + kVec < kCount) {
      after.unpack(near);
#pragma unroll
      for (int i = kLeft + kVec; i < kCount; ++i) in[i] = near[i - kLeft - kVec];
    }
  }
};

}  // namespace statescan::causal_conv1d::cuda
