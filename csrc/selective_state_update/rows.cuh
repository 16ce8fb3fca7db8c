// Some rows of the state in a warp, and what belongs to them: loads, the step, stores.
#pragma once

#include "common/device_view.cuh"
#include "common/lanes.cuh"
#include "common/scalar.cuh"
#include "selective_state_update/cuda.h"

#include "selective_state_update/equations.h"

namespace statescan::selective_state_update::cuda {

constexpr double kLog2e = 1.4426950408889634;

// A number as it is in memory, float or 16 bits: loading it neither branches nor waits for it.
struct Raw {
  uint32_t bits = 0;

  __device__ __forceinline__ static Raw load(const void* data, DType dtype, int64_t offset) {
    Raw raw;
    if (dtype == DType::kFloat32) {
      raw.bits = static_cast<const uint32_t*>(data)[offset];
    } else {
      raw.bits = static_cast<const uint16_t*>(data)[offset];
    }
    return raw;
  }
  __device__ __forceinline__ static Raw of(float x, DType dtype) {
    const uint32_t half = dtype == DType::kFloat16 ? ptx::pack_f16(x, 0) : ptx::pack_bf16(x, 0);
    return {dtype == DType::kFloat32 ? float_to_bits(x) : half};
  }
  __device__ __forceinline__ void store(void* data, DType dtype, int64_t offset) const {
    if (dtype == DType::kFloat32) {
      static_cast<uint32_t*>(data)[offset] = bits;
    } else {
      static_cast<uint16_t*>(data)[offset] = uint16_t(bits);
    }
  }
  __device__ __forceinline__ float number(DType dtype) const {
    const float half = ptx::f16_to_float(uint16_t(bits));
    return dtype == DType::kFloat32   ? bits_to_float(bits)
           : dtype == DType::kFloat16 ? half
                                      : bits_to_float(bits << 16);
  }
};

__device__ __forceinline__ Raw at_row(const View<4>& v, int64_t b, int64_t t, int64_t head,
                                      int64_t row) {
  return Raw::load(v.data, v.dtype,
                   b * v.stride[0] + t * v.stride[1] + head * v.stride[2] + row * v.stride[3]);
}
__device__ __forceinline__ Raw at_row(const View<2>& v, int64_t head, int64_t row) {
  return Raw::load(v.data, v.dtype, head * v.stride[0] + row * v.stride[1]);
}

// kCount numbers side by side, in as many loads of 16 bytes as they take (or one of 8).
template <class T, int kCount>
struct Line {
  static constexpr int kPart = kCount < kPackSize<T> ? kCount : kPackSize<T>;
  static constexpr int kParts = kCount / kPart;
  Pack<T, kPart> part[kParts];

  __device__ __forceinline__ void load(const void* data, int64_t offset) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      part[i] = Pack<T, kPart>::load(static_cast<const T*>(data) + offset + i * kPart);
    }
  }
  __device__ __forceinline__ void unpack(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float some[kPart];
      part[i].unpack(some);
#pragma unroll
      for (int j = 0; j < kPart; ++j) x[i * kPart + j] = some[j];
    }
  }
};

// Where a lane is: `lanes` lanes to a row, `places` rows of a warp side by side.
struct Place {
  int lanes, places;
  int lane;  // of its row
  int64_t b, head, group, first_row;
  int rows;  // of the head from first_row on, as far as they matter

  __device__ __forceinline__ int64_t row(int i) const { return first_row + i * places; }
  __device__ __forceinline__ bool has(int i) const { return i * places < rows; }
};

// Some rows of the state, and what belongs to them, in a lane. T is the type of the state, X that
// of B and C. kRowDecay: A is the same for all numbers of a row. What belongs to a row as a whole,
// lane i of a row loads and computes for the i-th of its kRows, its own one, and hands to the
// others by shuffles.
template <class T, class X, int kPacks, bool kRowDecay>
struct Rows {
  static constexpr int kVec = kPackSize<T>;
  // 4 packs of the state in registers, or 8 numbers beside as many of A.
  static constexpr int kMost = (kRowDecay ? 4 : 8 / kVec) / kPacks, kRows = kMost > 1 ? kMost : 1;
  static constexpr int kARows = kRowDecay ? 1 : kRows;

  float h[kRows][kPacks][kVec];
  Line<float, kRowDecay ? 1 : kVec> A[kARows][kPacks];
  Raw own_A, dt_bias, D;
  // Of one token.
  Line<X, kVec> B[kPacks], C[kPacks];
  Raw x, dt, z;

  static __device__ __forceinline__ int64_t number(const Place& at, int pack) {
    return int64_t(pack * at.lanes + at.lane) * kVec;
  }

  __device__ __forceinline__ void load_projections(const Params& p, const Place& at, int64_t t) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t n = number(at, j);
      B[j] = {}, C[j] = {};
      if (n >= p.state) continue;
      const View<4>&v = p.B, &w = p.C;
      B[j].load(v.data, at.b * v.stride[0] + t * v.stride[1] + at.group * v.stride[2] + n);
      C[j].load(w.data, at.b * w.stride[0] + t * w.stride[1] + at.group * w.stride[2] + n);
    }
  }

  // From lines of numbers at any address of 16 bytes, in shared memory for instance.
  __device__ __forceinline__ void load_projections(const Params& p, const Place& at, const X* B_t,
                                                   const X* C_t) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t n = number(at, j);
      B[j] = {}, C[j] = {};
      if (n < p.state) B[j].load(B_t, n), C[j].load(C_t, n);
    }
  }

  __device__ __forceinline__ void load_x(const Params& p, const Place& at, int64_t t) {
    const int own = at.lane % kRows;
    x = at.has(own) ? at_row(p.x, at.b, t, at.head, at.row(own)) : Raw{};
  }

  __device__ __forceinline__ void load_token(const Params& p, const Place& at, int64_t t) {
    dt = z = {};
    const int own = at.lane % kRows;
    if (!at.has(own)) return;
    dt = at_row(p.dt, at.b, t, at.head, at.row(own));
    if (p.z) z = at_row(p.z, at.b, t, at.head, at.row(own));
  }

  __device__ __forceinline__ void load_parameters(const Params& p, const Place& at) {
    own_A = dt_bias = D = {};
    const int own = at.lane % kRows;
    if (at.has(own)) {
      if (p.D) D = at_row(p.D, at.head, at.row(own));
      if (p.dt_bias) dt_bias = at_row(p.dt_bias, at.head, at.row(own));
      if (kRowDecay) {
        own_A =
            Raw::load(p.A.data, p.A.dtype, at.head * p.A.stride[0] + at.row(own) * p.A.stride[1]);
      }
    }
    if constexpr (!kRowDecay) {
      const int64_t offset = at.head * p.A.stride[0] + number(at, 0);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kPacks; ++j) {
          A[i][j] = {};
          if (!at.has(i) || number(at, j) >= p.state) continue;
          A[i][j].load(p.A.data, offset + at.row(i) * p.A.stride[1] + j * at.lanes * kVec);
        }
      }
    }
  }

  // The first of a lane's packs of the state.
  static __device__ __forceinline__ T* state_at(const Params& p, const Place& at, int64_t slot) {
    return static_cast<T*>(p.h.data) + slot * p.h.stride[0] + at.head * p.h.stride[1] +
           at.first_row * p.h.stride[2] + number(at, 0);
  }
  __device__ __forceinline__ void load_state(const Params& p, const Place& at, const T* from) {
    const int64_t step = at.places * p.h.stride[2];
    Pack<T, kVec> packs[kRows][kPacks];  // all of them, before the first is looked at
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        packs[i][j] = {};
        if (at.has(i) && number(at, j) < p.state) {
          packs[i][j] = Pack<T, kVec>::load(from + i * step + j * at.lanes * kVec);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) packs[i][j].unpack(h[i][j]);
    }
  }
  __device__ __forceinline__ void store_state(const Params& p, const Place& at, T* to) const {
    const int64_t step = at.places * p.h.stride[2];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        if (at.has(i) && number(at, j) < p.state) {
          Pack<T, kVec>::of(h[i][j]).store(to + i * step + j * at.lanes * kVec);
        }
      }
    }
  }

  // h of the next token, and this lane's part of <C, h> for each row.
  __device__ __forceinline__ void advance(const Params& p, const Place& at, float (&sum)[kRows]) {
    const float step = step_size(dt.number(p.dt.dtype), dt_bias.number(p.dt_bias.dtype),
                                 p.dt_softplus, float(p.dt_min), float(p.dt_max));
    const float own_dt_x = step * x.number(p.x.dtype);
    float own_a = step * float(kLog2e);
    if (kRowDecay) own_a = decay(own_a, own_A.number(p.A.dtype));
    float B_n[kPacks][kVec], C_n[kPacks][kVec];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) B[j].unpack(B_n[j]), C[j].unpack(C_n[j]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float dt_x = __shfl_sync(kAllLanes, own_dt_x, i, at.lanes);
      const float row_a = __shfl_sync(kAllLanes, own_a, i, at.lanes);
      sum[i] = 0;
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        float A_n[kVec];
        if constexpr (!kRowDecay) A[i][j].unpack(A_n);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const float a = kRowDecay ? row_a : decay(row_a, A_n[k]);
          h[i][j][k] = next_state(a, h[i][j][k], dt_x, B_n[j][k]);
          sum[i] += h[i][j][k] * C_n[j][k];
        }
      }
    }
  }

  // The sum over the lanes of a row, of the lane's own one: as many rows as it still has are halved
  // with every step, lanes that differ in one bit each keep the rows of theirs.
  __device__ __forceinline__ float own_sum(const Place& at, float (&sum)[kRows]) const {
#pragma unroll
    for (int bit = 1; bit < kRows; bit *= 2) {
      const bool odd = (at.lane & bit) != 0;
#pragma unroll
      for (int i = 0; i < kRows; i += 2 * bit) {
        const float kept = odd ? sum[i + bit] : sum[i], given = odd ? sum[i] : sum[i + bit];
        sum[i] = kept + __shfl_xor_sync(kAllLanes, given, bit);
      }
    }
#pragma unroll 1
    for (int bit = kRows; bit < at.lanes; bit *= 2)
      sum[0] += __shfl_xor_sync(kAllLanes, sum[0], bit);
    return sum[0];
  }

  __device__ __forceinline__ void store_output(const Params& p, const Place& at, int64_t t,
                                               float (&sum)[kRows]) const {
    float y = own_sum(at, sum);
    if (at.lane < kRows && at.has(at.lane)) {
      if (p.D) y = skip(y, D.number(p.D.dtype), x.number(p.x.dtype));
      if (p.z) y = gate(y, z.number(p.z.dtype));
      store_y(p, at, t, at.row(at.lane), y);
    }
    __syncwarp();
  }

  // What is skipped: zeros.
  static __device__ __forceinline__ void store_nothing(const Params& p, const Place& at) {
    for (int64_t t = 0; p.compute_output && t < p.tokens; ++t) {
      if (at.lane < kRows && at.has(at.lane)) store_y(p, at, t, at.row(at.lane), 0);
    }
  }

  static __device__ __forceinline__ void store_y(const Params& p, const Place& at, int64_t t,
                                                 int64_t row, float y) {
    const View<4>& v = p.y;
    store_element(v.data, v.dtype,
                  at.b * v.stride[0] + t * v.stride[1] + at.head * v.stride[2] + row * v.stride[3],
                  y);
  }
};

}  // namespace statescan::selective_state_update::cuda
