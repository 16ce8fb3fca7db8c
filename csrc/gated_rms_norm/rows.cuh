// What the forward and the backward of the gated norm share on the GPU: where rows lie, rows in
// registers, and sums over those who hold one.
//
// A team of threads holds a group of channels of one row in packs of 8 channels: member m has packs m,
// m + team, ... Teams are 2 to 32 lanes of a warp, or a whole block. Operands are of any type but
// double; what it is only decides how a pack is unpacked.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/device_view.cuh"
#include "common/divisor.h"
#include "common/lanes.cuh"
#include "common/scalar.cuh"
#include "common/shared.cuh"
#include "gated_rms_norm/shape.h"
// after the mathematics that it uses
#include "gated_rms_norm/equations.h"

namespace statescan::gated_rms_norm::cuda {

inline constexpr int kPack = 8;  // channels: 16 bytes, or twice 16 of float

// ---- where rows lie

struct Leads {
  Divisor size[kLead];
  bool several;  // there are more of them than the last

  explicit Leads(const Shape& p)
      : size{Divisor(p.lead[0]), Divisor(p.lead[1]), Divisor(p.lead[2]), Divisor(p.lead[3])},
        several(p.lead[3] != p.rows) {}
};

struct RowIndex {
  int64_t at[kLead];
  bool several;

  __device__ __forceinline__ RowIndex(const Leads& leads, int64_t row) : several(leads.several) {
    at[kLead - 1] = row;
    if (!several) return;
#pragma unroll
    for (int i = kLead - 1; i >= 0; --i) row = leads.size[i].divide(row, at[i]);
  }
  // Of a channel of this row.
  __device__ __forceinline__ int64_t offset(const Rows& v, int64_t channel) const {
    int64_t offset = channel * v.stride[kLead] + at[kLead - 1] * v.stride[kLead - 1];
    if (!several) return offset;
#pragma unroll
    for (int i = 0; i < kLead - 1; ++i) offset += at[i] * v.stride[i];
    return offset;
  }
};

// ---- rows in registers

// Packs as they are in memory; `high` is the second half of one of floats.
template <int kPacks>
struct Raw {
  uint4 low[kPacks], high[kPacks];
};

struct Member {
  int id, team;  // which of how many
  int packs;     // of the group
};

// Only asks for them, so that the next operand's are on their way as well.
template <int kPacks>
__device__ __forceinline__ void load_raw(const void* data, DType dtype, int64_t offset,
                                         const Member& m, bool active, Raw<kPacks>& raw) {
  const bool wide = dtype == DType::kFloat32;
  const char* row = static_cast<const char*>(data) + offset * (wide ? 4 : 2);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int pack = m.id + i * m.team;
    const bool there = active && pack < m.packs;
    const uint4* at = reinterpret_cast<const uint4*>(row + pack * (wide ? 32 : 16));
    raw.low[i] = there ? at[0] : uint4{};
    raw.high[i] = there && wide ? at[1] : uint4{};
  }
}

template <int kPacks>
__device__ __forceinline__ void unpack(const Raw<kPacks>& raw, DType dtype,
                                       float (&x)[kPacks][kPack]) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float half[4];
      Pack<float, 4>{raw.low[i]}.unpack(half);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[i][c] = half[c];
      Pack<float, 4>{raw.high[i]}.unpack(half);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[i][4 + c] = half[c];
    }
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) Pack<BFloat16, kPack>{raw.low[i]}.unpack(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) Pack<Half, kPack>{raw.low[i]}.unpack(x[i]);
  }
}

// One pack of a row, of `fill` where there is no such operand.
__device__ __forceinline__ void load_pack(const View<1>& v, int64_t channel, float fill,
                                          float (&x)[kPack]) {
  if (!v) {
#pragma unroll
    for (int c = 0; c < kPack; ++c) x[c] = fill;
    return;
  }
  const bool wide = v.dtype == DType::kFloat32;
  const uint4* at =
      reinterpret_cast<const uint4*>(static_cast<const char*>(v.data) + channel * (wide ? 4 : 2));
  const Raw<1> raw{{__ldg(at)}, {wide ? __ldg(at + 1) : uint4{}}};
  float row[1][kPack];
  unpack(raw, v.dtype, row);
#pragma unroll
  for (int c = 0; c < kPack; ++c) x[c] = row[0][c];
}

__device__ __forceinline__ void store_pack(const Rows& v, int64_t offset, const float (&x)[kPack]) {
  if (v.dtype == DType::kFloat32) {
    float* to = static_cast<float*>(v.data) + offset;
    const float low[4] = {x[0], x[1], x[2], x[3]}, high[4] = {x[4], x[5], x[6], x[7]};
    Pack<float, 4>::of(low).store(to);
    Pack<float, 4>::of(high).store(to + 4);
  } else if (v.dtype == DType::kBFloat16) {
    Pack<BFloat16, kPack>::of(x).store(static_cast<BFloat16*>(v.data) + offset);
  } else {
    Pack<Half, kPack>::of(x).store(static_cast<Half*>(v.data) + offset);
  }
}

// ---- sums

template <class R>
struct WarpSums {
  SharedArray<R, 3 * 32> of_warp;
};

// The sums over a team of each of kCount numbers, for all of its threads, in an order that only
// depends on the size of the team.
template <int kCount, class R>
__device__ __forceinline__ void sum_over_team(R (&x)[kCount], int team, WarpSums<R>& shared) {
  for (int lanes = (team < 32 ? team : 32) / 2; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(kAllLanes, x[i], lanes);
  }
  if (team <= 32) return;
  __syncthreads();  // the sums of the call before have been read
  const int warp = int(threadIdx.x / 32);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared.of_warp[warp * kCount + i] = x[i];
  }
  __syncthreads();  // every warp's sums are written
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = 0;
  for (int w = 0; w < team / 32; ++w) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += shared.of_warp[w * kCount + i];
  }
}

// ---- which kernel

// Threads of a team for `packs` packs, `each` of them to a thread: a power of two of lanes, or whole
// warps.
inline int team_of(int64_t packs, int64_t each) {
  const int64_t threads = (packs + each - 1) / each;
  if (threads > 32) return int((threads + 31) / 32 * 32);
  int team = 1;
  while (team < threads) team *= 2;
  return team;
}

// Can all of its rows be read and written in whole packs?
inline bool in_packs(const Rows& v) {
  if (!v) return true;
  if (v.dtype == DType::kFloat64 || v.stride[kLead] != 1) return false;
  const int64_t pack = 16 / element_bytes(v.dtype);
  for (int i = 0; i < kLead; ++i) {
    if (v.stride[i] % pack != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}
inline bool in_packs(const View<1>& v) {
  return !v || (v.dtype != DType::kFloat64 && v.stride[0] == 1 &&
                reinterpret_cast<uintptr_t>(v.data) % 16 == 0);
}

template <class F>
inline void with_gate(Gate gate, F&& f) {
  switch (gate) {
    case Gate::kNone: return f(std::integral_constant<Gate, Gate::kNone>{});
    case Gate::kBefore: return f(std::integral_constant<Gate, Gate::kBefore>{});
    case Gate::kAfter: return f(std::integral_constant<Gate, Gate::kAfter>{});
  }
}

// ---- one number at a time

template <class R>
__device__ __forceinline__ R load_from(const Rows& v, const RowIndex& row, int64_t c, R absent) {
  return v ? load_element<R>(v.data, v.dtype, row.offset(v, c)) : absent;
}
template <class R>
__device__ __forceinline__ R load_from(const View<1>& v, int64_t c, R absent) {
  return v ? load_element<R>(v.data, v.dtype, c * v.stride[0]) : absent;
}
template <class R>
__device__ __forceinline__ void store_to(const Rows& v, const RowIndex& row, int64_t c, R x) {
  if (v) store_element(v.data, v.dtype, row.offset(v, c), x);
}

// x with what is added to it.
template <class R>
__device__ __forceinline__ R added_input(const Shape& p, const RowIndex& row, int64_t c) {
  return load_from<R>(p.x, row, c, 0) + load_from<R>(p.residual, row, c, 0);
}

}  // namespace statescan::gated_rms_norm::cuda
