// Planes in shared memory: all tokens, or all steps of a route, of a few channels, read once from
// memory along it and then picked from in any order.
//
//   32 words and one to spare, 32 words and one to spare, ..; another one after every 1024
//
// Columns of a map, reversed packs and most other routes pick words a fixed number apart. Without
// the spare words a power of two in that number would send 32 lanes to few banks; with them, strides
// of 1, 2, 4, .. 512 words and those of maps 7, 14, 28, 56 wide meet all 32 or nearly so.
#pragma once

#include <cstdint>

#include "common/device_view.cuh"
#include "common/divisor.h"
#include "common/shared.cuh"
#include "common/view.h"

namespace statescan::route_gather::cuda {

// Every GPU since Volta but Turing has so much for a block. Two blocks fill an SM of H100.
inline constexpr int64_t kSharedBytes = 96 * 1024;

// Where element i of a plane lies.
template <class E>
STATESCAN_HOST_DEVICE constexpr int skewed(int i) {
  constexpr int kInWord = 4 / int(sizeof(E));
  const int word = i / kInWord;
  return i + ((word >> 5) + (word >> 10)) * kInWord;
}

// Elements from one plane of n to the next. Element n is there as well: the zero of steps that visit
// no token.
template <class E>
STATESCAN_HOST_DEVICE constexpr int64_t plane_pitch(int64_t n) {
  constexpr int64_t kInWord = 4 / int64_t(sizeof(E));
  return (skewed<E>(int(n)) / kInWord + 1) * kInWord;
}

// How the planes of a block lie in memory.
struct Staging {
  bool along_channels;  // neighbours in memory are channels, not places of a plane
  bool packed;          // read 16 bytes at a time
  SmallDivisor inner;   // packs along that dimension

  // n places of `channels` channels; `stride` is that of the other dimension, `aligned` says that
  // all but it allows packs.
  static Staging of(const View<4>& v, int64_t channels, int64_t n, int64_t pack) {
    const bool along_channels = v.stride[2] == 1 && v.stride[3] != 1;
    const int64_t size = along_channels ? channels : n;
    const int64_t other = along_channels ? v.stride[3] : v.stride[2];
    const bool packed = size % pack == 0 && other % pack == 0 && v.stride[0] % pack == 0 &&
                        v.stride[1] % pack == 0 && (along_channels || v.stride[3] == 1) &&
                        reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
    return {along_channels, packed, SmallDivisor(packed ? size / pack : size)};
  }
};

// The block reads n places of the `channels` channels at `from` into planes. Ends without a barrier.
template <class E>
__device__ __forceinline__ void stage(E* planes, int pitch, const E* from, int64_t channel_stride,
                                      int64_t place_stride, int channels, int n, const Staging& s) {
  constexpr int kPack = 16 / int(sizeof(E)), kInWord = 4 / int(sizeof(E)), kLoads = 4;
  const unsigned outer = unsigned(s.along_channels ? n : channels);
  const unsigned tasks = outer * s.inner.divisor;
  const int width = s.packed ? kPack : 1;
  for (unsigned first = threadIdx.x; first < tasks; first += kLoads * blockDim.x) {
    uint4 pack[kLoads];
    E one[kLoads];
    int channel[kLoads], place[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {  // on their way together
      const unsigned task = first + i * blockDim.x;
      unsigned at;
      const unsigned row = s.inner.divide(task, at);
      channel[i] = s.along_channels ? int(at) * width : int(row);
      place[i] = s.along_channels ? int(row) : int(at) * width;
      if (task >= tasks || channel[i] >= channels) {
        channel[i] = -1;
        continue;
      }
      const E* p = from + channel[i] * channel_stride + place[i] * place_stride;
      if (s.packed) {
        pack[i] = __ldg(reinterpret_cast<const uint4*>(p));
      } else {
        one[i] = __ldg(p);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (channel[i] < 0) continue;
      E* to = planes + channel[i] * pitch + skewed<E>(place[i]);
      if (!s.packed) {
        *to = one[i];
        continue;
      }
      const uint32_t words[4] = {pack[i].x, pack[i].y, pack[i].z, pack[i].w};
      if (!s.along_channels) {  // the words of a pack lie side by side in a plane, too
#pragma unroll
        for (int w = 0; w < 4; ++w) reinterpret_cast<uint32_t*>(to)[w] = words[w];
        continue;
      }
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        to[j * pitch] = E(words[j / kInWord] >> (j % kInWord * 8 * sizeof(E)));
      }
    }
  }
}

// Elements as they were read, side by side.
template <class E, int kCount>
__device__ __forceinline__ uint4 packed(const E (&x)[kCount]) {
  static_assert(kCount * sizeof(E) == 16);
  constexpr int kInWord = 4 / int(sizeof(E));
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    words[i / kInWord] |= uint32_t(x[i]) << (i % kInWord * 8 * sizeof(E));
  return {words[0], words[1], words[2], words[3]};
}

// kCount entries of a table from an address that is a multiple of 16 bytes.
template <int kCount>
__device__ __forceinline__ void load_entries(const int32_t* p, int (&x)[kCount]) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint4 four = __ldg(reinterpret_cast<const uint4*>(p + i));
    x[i] = int(four.x), x[i + 1] = int(four.y), x[i + 2] = int(four.z), x[i + 3] = int(four.w);
  }
}

}  // namespace statescan::route_gather::cuda
