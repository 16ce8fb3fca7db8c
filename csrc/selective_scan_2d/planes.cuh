// Planes of tokens: from a map and back, and what a warp reads of and adds to its own.
#pragma once

#include "common/device_view.cuh"
#include "common/scalar.cuh"
#include "selective_scan_2d/tile.cuh"

namespace statescan::selective_scan_2d::cuda {

// Calls f(tag of the pack's size, pointer, channel, token) for packs and single elements of `channels`
// channels, by the first `threads` threads of the block.
template <class T, class F>
__device__ __forceinline__ void for_tokens(T* first, int64_t channel_stride, int64_t token_stride,
                                           int channels, int64_t tokens, int threads, F&& f) {
  const int thread = ptx::opaque(int(threadIdx.x));  // found out anew, see there
  const std::integral_constant<int, 1> one;
  constexpr int kVec = sizeof(T) < 8 ? kPackSize<T> : 1;
  int64_t done = 0;
  if constexpr (kVec > 1) {
    if (token_stride == 1 && is_aligned(first, channel_stride, kVec)) {
      done = tokens / kVec * kVec;
#pragma unroll 1
      for (int c = 0; c < channels; ++c) {
#pragma unroll 2
        for (int64_t t = thread * kVec; t < done; t += threads * kVec) {
          f(std::integral_constant<int, kVec>{}, first + c * channel_stride + t, c, int(t));
        }
      }
    }
  }
  if (token_stride > channel_stride && token_stride > 1) {  // channels are neighbours in memory
#pragma unroll 1
    for (int c = thread % kWarps; c < channels; c += kWarps) {
#pragma unroll 2
      for (int64_t t = thread / kWarps; t < tokens; t += threads / kWarps) {
        f(one, first + c * channel_stride + t * token_stride, c, int(t));
      }
    }
    return;
  }
#pragma unroll 1
  for (int c = 0; c < channels && done < tokens; ++c) {
#pragma unroll 2
    for (int64_t t = done + thread; t < tokens; t += threads) {
      f(one, first + c * channel_stride + t * token_stride, c, int(t));
    }
  }
}

// Planes of one kind, of all channels of the block.
template <class R_>
struct Planes {
  using R = R_;
  R* first;
  int pitch;
  __device__ __forceinline__ R& at(int c, int token) const {
    return first[int64_t(c) * pitch + in_plane(token)];
  }
  __device__ __forceinline__ void clear(int channels) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < int64_t(channels) * pitch; i += blockDim.x) {
      first[i] = 0;
    }
  }
};
template <class C>
__device__ __forceinline__ Planes<typename C::R> planes_of(const Inputs& p, const Memory<C>& memory,
                                                           int kind) {
  return {memory.plane + int64_t(kind) * p.plan.channels * p.plan.pitch, p.plan.pitch};
}

// What becomes of a plane's number that meets a tensor's.
enum class Meet { kAssign, kTimes, kTimesSilu, kTimesSiluSlope };

template <class R>
__device__ __forceinline__ R meet(Meet how, R number, R x) {
  if (how == Meet::kAssign) return x;
  if (how == Meet::kTimes) return number * x;
  const R gate = sigmoid(x);
  return number * (how == Meet::kTimesSilu ? x * gate : silu_slope(x, gate));
}

// P: Planes, or pairs of them.
template <class P>
__device__ __forceinline__ void read_tokens(const View<4>& x, const Task& task, int64_t route,
                                            int64_t tokens, Meet how, const P& planes) {
  using R = typename P::R;
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= sizeof(R)) {
      const T* first = first_token<const T>(x, task, route);
      for_tokens(first, x.stride[2], x.stride[3], task.channels, tokens, int(blockDim.x),
                 [&](auto size, const T* from, int c, int t) {
                   constexpr int kSize = decltype(size)::value;
                   if constexpr (kSize == 1) {
                     R& number = planes.at(c, t);
                     number = meet(how, how == Meet::kAssign ? R(0) : number, R(to_number(*from)));
                   } else {
                     float v[kSize];
                     Pack<T, kSize>::load(from).unpack(v);
                     if (how == Meet::kAssign) {
#pragma unroll
                       for (int j = 0; j < kSize; ++j) planes.at(c, t + j) = v[j];
                       return;
                     }
#pragma unroll 1
                     for (int j = 0; j < kSize; ++j) {
                       R& number = planes.at(c, t + j);
                       number = meet(how, number, R(to_number(from[j])));
                     }
                   }
                 });
    }
  });
}

// Reads 16-bit elements as they are into halves of words: half(c, token) says where. By the
// first `threads` threads of the block.
template <class Half>
__device__ __forceinline__ void read_halves(const View<4>& x, const Task& task, int64_t route,
                                            int64_t tokens, int threads, Half&& half) {
  const auto* first = first_token<const uint16_t>(x, task, route);
  for_tokens(first, x.stride[2], x.stride[3], task.channels, tokens, threads,
             [&](auto size, const uint16_t* from, int c, int t) {
               auto put = [&](int i, uint32_t bits) { half(c, t + i) = uint16_t(bits); };
               if constexpr (decltype(size)::value == 1) {
                 put(0, *from);
               } else {
                 const uint4 v = *reinterpret_cast<const uint4*>(from);
                 const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                 for (int i = 0; i < 8; ++i) put(i, words[i / 2] >> (i % 2 * 16));
               }
             });
}

template <class P>
__device__ __forceinline__ void write_tokens(const View<4>& x, const Task& task, int64_t route,
                                             int64_t tokens, const P& planes) {
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* first = first_token<T>(x, task, route);
    for_tokens(first, x.stride[2], x.stride[3], task.channels, tokens, int(blockDim.x),
               [&](auto size, T* to, int c, int t) {
                 if constexpr (std::is_same_v<T, double>) {
                   *to = planes.at(c, t);
                 } else if constexpr (decltype(size)::value == 1) {
                   *to = from_number<T>(float(planes.at(c, t)));
                 } else {
                   constexpr int kSize = decltype(size)::value;
                   float v[kSize];
#pragma unroll
                   for (int j = 0; j < kSize; ++j) v[j] = float(planes.at(c, t + j));
                   Pack<T, kSize>::of(v).store(to);
                 }
               });
  });
}

// (batch, dim, token) as a tensor with a route axis.
STATESCAN_HOST_DEVICE View<4> with_routes(const View<3>& x) {
  return {x.data, x.dtype, {x.stride[0], 0, x.stride[1], x.stride[2]}};
}

// Reads a warp's plane at its lane's steps: 0 at steps of no token.
template <class C>
__device__ __forceinline__ void gather(typename C::R* plane, int flags, const int (&at)[C::kItems],
                                       typename C::Items& x) {
  if (flags & kHoles) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) x[j] = at[j] >= 0 ? plane[at[j]] : 0;
    return;
  }
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) x[j] = plane[at[j]];
}

// Both halves of words.
template <class C>
__device__ __forceinline__ void gather_halves(const float* plane, int flags, DType dtype,
                                              const int (&at)[C::kItems], float (&low)[C::kItems],
                                              float (&high)[C::kItems]) {
  uint32_t word[C::kItems];
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    word[j] = !(flags & kHoles) || at[j] >= 0 ? float_to_bits(plane[at[j]]) : 0;
  }
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) {
      low[j] = bits_to_float(word[j] << 16), high[j] = bits_to_float(word[j] & 0xffff0000);
    }
  } else {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) {
      low[j] = to_number(Half{uint16_t(word[j])}),
      high[j] = to_number(Half{uint16_t(word[j] >> 16)});
    }
  }
}

// plane += scale x. Where a token comes twice lanes take turns, in the order of the route.
template <class C>
__device__ __forceinline__ void add_to(typename C::R* plane, int flags, const int (&at)[C::kItems],
                                       int lane, typename C::R scale, const typename C::Items& x) {
  if (flags & kRepeats) {
#pragma unroll 1
    for (int turn = 0; turn < 32; ++turn) {
      if (lane == turn) {
#pragma unroll
        for (int j = 0; j < C::kItems; ++j) {
          if (at[j] >= 0) plane[at[j]] += scale * x[j];
        }
      }
      __syncwarp();  // what the turn added is there
    }
    return;
  }
  typename C::Items sum;
  gather<C>(plane, flags, at, sum);
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) sum[j] += scale * x[j];
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    if (!(flags & kHoles) || at[j] >= 0) plane[at[j]] = sum[j];
  }
  __syncwarp();  // the next tile may come to the same tokens
}

}  // namespace statescan::selective_scan_2d::cuda
