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

// A pack with those of its neighbours that kLeft inputs before it and kRight after it lie in.
template <class T, int kLeft, int kRight>
struct Neighbours {
  static constexpr int kVec = kPackSize<T>, kCount = kVec + kLeft + kRight;
  Pack<T, kVec> before, own, after;

  __device__ __forceinline__ void load(const T* row, int64_t t, int64_t n, bool aligned) {
    if constexpr (kLeft > 0) before = load_pack(row, t - kVec, n, aligned);
    own = load_pack(row, t, n, aligned);
    if constexpr (kRight > 0) after = load_pack(row, t + kVec, n, aligned);
  }

  // All of it there, and aligned.
  __device__ __forceinline__ void load_whole(const T* from) {
    if constexpr (kLeft > 0) before = Pack<T, kVec>::load(from - kVec);
    own = Pack<T, kVec>::load(from);
    if constexpr (kRight > 0) after = Pack<T, kVec>::load(from + kVec);
  }

  // in[i] is the input at time t - kLeft + i.
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
    if constexpr (kRight > 0) {
      after.unpack(near);
#pragma unroll
      for (int i = 0; i < kRight; ++i) in[kLeft + kVec + i] = near[i];
    }
  }
};

}  // namespace statescan::causal_conv1d::cuda
