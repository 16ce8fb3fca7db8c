// How the operands of a tile come to shared memory and go back.
//
// In shared memory every operand is float (or double) and lies [step][channel], whatever its dtype
// and strides: rows of time are read 16 bytes at a time, rows of channels 8, anything else one
// element at a time. Steps past the end of the sequence, channels past the end of the group and
// padding are made steps of size 0, which leave the state as it is.
#pragma once

#include "selective_scan/tile.cuh"

namespace statescan::selective_scan::cuda {

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p, int64_t stride, int count) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * count) == 0 && stride % count == 0;
}

// Calls f(tag of the pack's size, pointer, step, channel) for every pack of a tile's rows, and
// f(tag 1, ...) for single elements: those in bounds alone.
template <class C, class T, class F>
__device__ __forceinline__ void for_packs(T* first, int64_t row_stride, int64_t time_stride,
                                          int64_t repeat, int64_t channel, int channels, int steps,
                                          F&& f) {
  const int thread = int(threadIdx.x);
  const std::integral_constant<int, 1> one;
  auto at = [&](int c, int t) {
    const int64_t row = repeat == 1 ? channel + c : (channel + c) / repeat;
    return first + row * row_stride + t * time_stride;
  };
  if constexpr (sizeof(T) < 8) {
    constexpr int kVec = kPackSize<T>, kPacks = kSteps / kVec;
    if (time_stride == 1 && is_aligned(first, row_stride, kVec)) {
#pragma unroll 1
      for (int i = thread; i < C::kChannels * kPacks; i += C::kThreads) {
        const int c = i / kPacks, t = i % kPacks * kVec;
        if (c >= channels) continue;
        if (t + kVec <= steps) {
          f(std::integral_constant<int, kVec>{}, at(c, t), t, c);
        } else {
          for (int j = t; j < steps; ++j) f(one, at(c, j), j, c);
        }
      }
      return;
    }
    constexpr int kRowPacks = C::kChannels / 4;  // of 4 channels: 8 or 16 bytes
    if (row_stride == 1 && repeat == 1 && is_aligned(first + channel, time_stride, 4)) {
#pragma unroll 1
      for (int i = thread; i < steps * kRowPacks; i += C::kThreads) {
        const int t = i / kRowPacks, c = i % kRowPacks * 4;
        if (c + 4 <= channels) {
          f(std::integral_constant<int, -4>{}, at(c, t), t, c);
        } else {
          for (int j = c; j < channels; ++j) f(one, at(j, t), t, j);
        }
      }
      return;
    }
  }
  const bool time_inside = time_stride < row_stride;
#pragma unroll 1
  for (int i = thread; i < C::kChannels * kSteps; i += C::kThreads) {
    const int c = time_inside ? i / kSteps : i % C::kChannels;
    const int t = time_inside ? i % kSteps : i / C::kChannels;
    if (c < channels && t < steps) f(one, at(c, t), t, c);
  }
}

// tile[t, c] = x[b, (channel + c) / repeat, begin + t]. The rest of the tile is left as it is.
template <class C, class T>
__device__ __forceinline__ void load_tile_of(const T* data, const View<3>& x, int64_t repeat,
                                             const Task& task, const Span& span, Tile<C>& tile) {
  using R = typename C::R;
  const T* first = data + task.b * x.stride[0] + span.begin * x.stride[2];
  for_packs<C>(first, x.stride[1], x.stride[2], repeat, task.channel, task.channels, span.steps,
               [&](auto size, const T* from, int t, int c) {
                 constexpr int kSize = decltype(size)::value, kVec = kSize < 0 ? -kSize : kSize;
                 if constexpr (kVec == 1) {
                   tile[t * C::kPitch + c] = R(to_number(*from));
                 } else {
                   float v[kVec];
                   Pack<T, kVec>::load(from).unpack(v);
#pragma unroll
                   for (int j = 0; j < kVec; ++j) {
                     tile[kSize < 0 ? t * C::kPitch + c + j : (t + j) * C::kPitch + c] = v[j];
                   }
                 }
               });
}
template <class C>
__device__ __forceinline__ void load_tile(const View<3>& x, int64_t repeat, const Task& task,
                                          const Span& span, Tile<C>& tile) {
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= sizeof(typename C::R)) {  // double is computed in double
      load_tile_of<C>(static_cast<const T*>(x.data), x, repeat, task, span, tile);
    }
  });
}

// x[b, channel + c, begin + t] = value(t, where c is in a tile's row t)
template <class C, class T, class F>
__device__ __forceinline__ void store_tile_of(T* data, const View<3>& x, const Task& task,
                                              const Span& span, F&& value) {
  T* first = data + task.b * x.stride[0] + span.begin * x.stride[2];
  for_packs<C>(first, x.stride[1], x.stride[2], 1, task.channel, task.channels, span.steps,
               [&](auto size, T* to, int t, int c) {
                 constexpr int kSize = decltype(size)::value;
                 auto element = [&](int j) {
                   return kSize < 0 ? value(t, t * C::kPitch + c + j)
                                    : value(t + j, (t + j) * C::kPitch + c);
                 };
                 if constexpr (std::is_same_v<T, double>) {
                   *to = element(0);
                 } else if constexpr (kSize == 1) {
                   *to = from_number<T>(float(element(0)));
                 } else {
                   constexpr int kVec = kSize < 0 ? -kSize : kSize;
                   float v[kVec];
#pragma unroll
                   for (int j = 0; j < kVec; ++j) v[j] = float(element(j));
                   Pack<T, kVec>::of(v).store(to);
                 }
               });
}
template <class C, class F>
__device__ __forceinline__ void store_tile(const View<3>& x, const Task& task, const Span& span,
                                           F&& value) {
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    store_tile_of<C>(static_cast<T*>(x.data), x, task, span, value);
  });
}

// tile[t, n] = B (or C) of state first + n at step begin + t; 0 past the ends and at padding.
template <class C>
__device__ __forceinline__ void load_states_tile(const Inputs& p, const View<4>& x,
                                                 const Task& task, const Span& span, int first,
                                                 StateTile<C>& tile) {
  using R = typename C::R;
  const bool time_inside = x.stride[3] < x.stride[2];
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(x.data) + task.b * x.stride[0] +
                    task.group * x.stride[1] + first * x.stride[2] + span.begin * x.stride[3];
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kSteps * C::kStates; i += C::kThreads) {
      const int n = time_inside ? i / kSteps : i % C::kStates;
      const int t = time_inside ? i % kSteps : i / C::kStates;
      const bool there =
          t < span.steps && first + n < p.state &&
          !(p.marks != nullptr && p.marks[task.b * p.seqlen + span.begin + t] & kPadding);
      tile[t * C::kStatePitch + n] =
          there ? R(to_number(from[n * x.stride[2] + t * x.stride[3]])) : R(0);
    }
  });
}

}  // namespace statescan::selective_scan::cuda
