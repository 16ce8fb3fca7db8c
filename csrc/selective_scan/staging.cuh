// How the operands of a tile come to a block and its results go back.
//
//   global memory  --fetch-->  shared memory, as they lie  --read-->  numbers in registers
//
// Fetches of 16 bytes at a time run beside the threads: a tile comes while the one before it is
// walked. What is past the last row or step is zero.
#pragma once

#include <cstddef>

#include "selective_scan/tile.cuh"

namespace statescan::selective_scan::cuda {

// What is fetched for a tile: operands by Over, B, C, and for the backward the state before the
// tile.
enum { kFetchB = 4, kFetchC, kFetchEntry, kFetches };

STATESCAN_HOST_DEVICE constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// What a block fetches of a tensor, the same for all of its tiles.
struct Source {
  const char* data;                 // the block's first row at the first step
  int64_t row_stride, time_stride;  // in bytes
  int64_t row, repeat;  // so many neighbouring rows are one: with `row` before the first
  int log2_bytes;       // of an element
  Access access;
};

// Where it is put: rows of steps as they lie in memory, [row][step], or along rows [step][row]. Of
// B and C rows are states, of the state before a tile steps are.
template <class C, bool kBackward>
struct Fetched {
  static constexpr int kOperand = C::kChannels * kSteps / 16;  // packs, times bytes of an element
  static constexpr int kStates = (C::kStates * kSteps * int(sizeof(typename C::R)) + 15) / 16;
  static constexpr int kEntry =
      kBackward ? C::kChannels * C::kStates * int(sizeof(typename C::R)) / 16 : 0;
  static constexpr int kOperands = kBackward ? 4 : 3;
  static constexpr int kPacks =
      2 * kStates + kEntry + kOperands * kOperand * int(sizeof(typename C::R));

  SharedArray<Source, kFetches> source;
  alignas(16) SharedArray<uint4, kPacks> pack;  // at the end: not all of it need be there

  // The first pack of a fetch: B, C, entry, u, delta, dy, and z last.
  STATESCAN_HOST_DEVICE static int begin(const Inputs& p, int i) {
    if (i >= kFetchB) return (i - kFetchB) * kStates;
    const int place = i == kZ ? kOperands - 1 : i == kDy ? kDelta + 1 : i;
    return 2 * kStates + kEntry + place * (kOperand << p.log2_operand_bytes);
  }
};

// Bytes of a block's shared memory: its struct ends with `fetched` and tiles that only a gate
// needs.
template <class Shared>
size_t shared_bytes(const Inputs& p) {
  using F = decltype(Shared::fetched);
  if (p.over[kZ]) return sizeof(Shared);
  return offsetof(Shared, fetched) + offsetof(F, pack) + F::begin(p, kZ) * sizeof(uint4);
}

// Rows and steps of a fetch, how many there can be and how many there are.
struct Extent {
  int log2_rows, log2_steps, rows, steps;
};

// By the lanes of a warp. A line, of steps or along rows of rows, has at most 32 packs.
__device__ __forceinline__ void fetch_packs(const Source& x, int64_t offset, const Extent& size,
                                            uint4* to) {
  const int lane = int(threadIdx.x) % 32;
  const bool along_rows = x.access == Access::kAlongRows;
  const int shift = (along_rows ? size.log2_rows : size.log2_steps) + x.log2_bytes - 4;
  const int64_t line_stride = along_rows ? x.time_stride : x.row_stride;
  const int packs = 1 << (size.log2_rows + size.log2_steps + x.log2_bytes - 4);
  const int at = (lane & ((1 << shift) - 1)) * 16;
  const char* from = x.data + offset + (lane >> shift) * line_stride + at;
  const int64_t step = line_stride << (5 - shift);
  if (size.rows >> size.log2_rows & size.steps >> size.log2_steps) {  // a whole tile
#pragma unroll 1
    for (int i = lane; i < packs; i += 32, from += step) ptx::cp_async_16(to + i, from);
    return;
  }
  const int lines = along_rows ? size.steps : size.rows;
  const int left = ((along_rows ? size.rows : size.steps) << x.log2_bytes) - at;
#pragma unroll 1
  for (int i = lane; i < packs; i += 32, from += step) {
    const bool there = i >> shift < lines && left > 0;
    ptx::cp_async_16(to + i, there ? from : x.data, !there ? 0 : left < 16 ? left : 16);
  }
}

template <class T>
__device__ __forceinline__ void fetch_elements(const Source& x, int64_t offset, const Extent& size,
                                               T* to) {
  const int lane = int(threadIdx.x) % 32;
  const bool time_inside = x.time_stride < x.row_stride;
#pragma unroll 1
  for (int i = lane; i < 1 << (size.log2_rows + size.log2_steps); i += 32) {
    const int row = time_inside ? i >> size.log2_steps : i & ((1 << size.log2_rows) - 1);
    const int t = time_inside ? i & ((1 << size.log2_steps) - 1) : i >> size.log2_rows;
    const int64_t r = x.repeat == 1 ? row : (x.row + row) / x.repeat;
    const char* from = x.data + offset + r * x.row_stride + t * x.time_stride;
    to[(row << size.log2_steps) + t] =
        row < size.rows && t < size.steps ? *reinterpret_cast<const T*>(from) : T(0);
  }
}

// Starts to fetch what `wanted` has bits of, each by one warp, for a tile and the states from
// `first` on. To be followed by cp_async_commit, cp_async_wait and a barrier.
template <class C, bool kBackward>
__device__ __forceinline__ void fetch(const Inputs& p, const Task& task, const Span& span,
                                      int first, unsigned wanted, Fetched<C, kBackward>& to) {
  const int states = first + C::kStates < p.state ? C::kStates : int(p.state - first);
  constexpr int kChannels = log2_of(C::kChannels), kStates = log2_of(C::kStates);
#pragma unroll 1
  for (int i = int(threadIdx.x) / 32; i < kFetches; i += C::kWarps) {
    if (!(wanted >> i & 1)) continue;
    const Source x = to.source[i];
    Extent size{kChannels, log2_of(kSteps), task.channels, span.steps};
    int64_t offset = span.begin * x.time_stride;
    if (i >= kFetchB) {
      if (i == kFetchEntry) {
        size.log2_steps = kStates, size.steps = states;
        offset = (span.tile * p.state + first) * x.time_stride;
      } else {
        size.log2_rows = kStates, size.rows = states;
        offset += first * x.row_stride;
      }
    }
    uint4* packs = &to.pack[Fetched<C, kBackward>::begin(p, i)];
    if (x.access != Access::kSingle) {
      fetch_packs(x, offset, size, packs);
    } else if (x.log2_bytes == 1) {
      fetch_elements(x, offset, size, reinterpret_cast<uint16_t*>(packs));
    } else if (x.log2_bytes == 2) {
      fetch_elements(x, offset, size, reinterpret_cast<uint32_t*>(packs));
    } else if constexpr (sizeof(typename C::R) == 8) {
      fetch_elements(x, offset, size, reinterpret_cast<uint64_t*>(packs));
    }
  }
}

__device__ __forceinline__ bool is_constant(const Inputs& p, int i) {
  return i == 0 ? p.constant_B : p.constant_C;
}

// Bits of B and C where they are not constant.
__device__ __forceinline__ unsigned projection_bits(const Inputs& p) {
  return (p.constant_B ? 0u : 1u << kFetchB) | (p.constant_C ? 0u : 1u << kFetchC);
}

__device__ __forceinline__ int log2_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 3 : dtype == DType::kFloat32 ? 2 : 1;
}

// By the first threads of the block: operands, B and C.
__device__ __forceinline__ void find_sources(const Inputs& p, const Task& task,
                                             SharedArray<Source, kFetches>& source) {
  const int i = int(threadIdx.x);
  if (i < kFetchB) {
    const View<3>& x = p.over[i];
    const int64_t size = element_bytes(x.dtype), repeat = i == kDelta ? p.delta_repeat : 1;
    const int64_t first = task.b * x.stride[0] + (repeat == 1 ? task.channel * x.stride[1] : 0);
    source[i] = {static_cast<const char*>(x.data) + first * size,
                 x.stride[1] * size,
                 x.stride[2] * size,
                 task.channel,
                 repeat,
                 log2_bytes(x.dtype),
                 p.access[i]};
  } else if (i <= kFetchC) {
    const View<4>& x = p.projection[i - kFetchB];
    const int64_t size = element_bytes(x.dtype);
    const int64_t first = task.b * x.stride[0] + task.group * x.stride[1];
    source[i] = {static_cast<const char*>(x.data) + first * size,
                 x.stride[2] * size,
                 x.stride[3] * size,
                 0,
                 1,
                 log2_bytes(x.dtype),
                 p.projection_access[i - kFetchB]};
  }
}

// v[j] = row `row`, step t + j of what was fetched.
template <int kRows, int kSpan, class R, int kCount>
__device__ __forceinline__ void read(const uint4* packs, DType dtype, Access access, int row, int t,
                                     R (&v)[kCount]) {
  with_device_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= sizeof(R)) {  // double is computed in double
      const T* x = reinterpret_cast<const T*>(packs);
      if (access == Access::kAlongRows) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) v[j] = R(to_number(x[(t + j) * kRows + row]));
        return;
      }
      x += row * kSpan + t;
      constexpr int kPack = kCount < kPackSize<T> ? kCount : kPackSize<T>;
      if constexpr (sizeof(T) == 8 || kPack * sizeof(T) < 8) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) v[j] = R(to_number(x[j]));
      } else {
#pragma unroll
        for (int j = 0; j < kCount; j += kPack) {
          float some[kPack];
          Pack<T, kPack>::load(x + j).unpack(some);
#pragma unroll
          for (int i = 0; i < kPack; ++i) v[j + i] = some[i];
        }
      }
    }
  });
}

// A run of kRun steps of channel c of an operand.
template <class C, bool kBackward>
__device__ __forceinline__ void read_run(const Inputs& p, Over over, Fetched<C, kBackward>& from,
                                         int c, int t, typename C::R (&v)[C::kRun]) {
  read<C::kChannels, kSteps>(&from.pack[Fetched<C, kBackward>::begin(p, over)], p.over[over].dtype,
                             p.access[over], c, t, v);
}

// to[i, n] = B (or C) of state first + n at step i of the scan; 0 past the ends and at padding.
// Half of the threads take care of B, the others of C.
template <class C, bool kBackward>
__device__ __forceinline__ void stage_projections(const Inputs& p, unsigned wanted, unsigned inside,
                                                  Fetched<C, kBackward>& from,
                                                  SharedArray<StateTile<C>, 2>& to) {
  using R = typename C::R;
  constexpr int kHalf = C::kThreads / 2, kShare = kSteps * C::kStates / kHalf;
  constexpr int kCount = kShare < 1 ? 1 : kShare, kRuns = kSteps / kCount;
  const int i = int(threadIdx.x) / kHalf;
  const int n = int(threadIdx.x) % kHalf / kRuns, t = int(threadIdx.x) % kRuns * kCount;
  if (n >= C::kStates || !(wanted >> (kFetchB + i) & 1)) return;
  R v[kCount];
  read<C::kStates, kSteps>(&from.pack[Fetched<C, kBackward>::begin(p, kFetchB + i)],
                           p.projection[i].dtype, p.projection_access[i], n, t, v);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    to[i][in_scan(p, t + j) * C::kStatePitch + n] = inside >> (t + j) & 1 ? v[j] : R(0);
  }
}

// x[b, channel + run.c, begin + t + j] = v[j], where there is such an element.
template <class C>
__device__ __forceinline__ void store_run(const View<3>& x, bool packed, const Task& task,
                                          const Span& span, int c, int t,
                                          const typename C::R (&v)[C::kRun]) {
  if (c >= task.channels) return;
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(x.data) + task.b * x.stride[0] + (task.channel + c) * x.stride[1] +
            (span.begin + t) * x.stride[2];
    if constexpr (sizeof(T) < 8) {
      constexpr int kPack = C::kRun < kPackSize<T> ? C::kRun : kPackSize<T>;
      if (packed && t + C::kRun <= span.steps) {
#pragma unroll
        for (int j = 0; j < C::kRun; j += kPack) {
          float some[kPack];
#pragma unroll
          for (int i = 0; i < kPack; ++i) some[i] = float(v[j + i]);
          Pack<T, kPack>::of(some).store(to + j);
        }
        return;
      }
    }
#pragma unroll
    for (int j = 0; j < C::kRun; ++j) {
      if (t + j >= span.steps) continue;
      if constexpr (sizeof(T) == 8) {
        to[j * x.stride[2]] = v[j];
      } else {
        to[j * x.stride[2]] = from_number<T>(float(v[j]));
      }
    }
  });
}

}  // namespace statescan::selective_scan::cuda
