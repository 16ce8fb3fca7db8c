// The state update on the GPU. Bound by memory: every number of the state is read and written once, 16
// bytes at a time, and all that a token needs is asked for before anything is computed.
//
//   a row of the state, N = 128 in float32:   | lane 0 | lane 1 | .. | lane 31 |   4 numbers each
//   a shorter one, N = 16:                    | 0 | 1 | 2 | 3 | next row: | 4 | 5 | 6 | 7 | ..
//
// A warp has kRows rows in each place, so that as many packs of each lane are on their way; rows of one
// head share its B and C. A lane keeps its packs from token to token. The sum over a row is one of
// shuffles, after which lane i of a row finishes the i-th of its kRows (D, z, store).
//
// What indices hold is read here, on the device. A slot that does not exist is skipped like a negative
// one; that slots differ from each other is up to the caller.
#include "common/device_view.cuh"
#include "common/divisor.h"
#include "common/launch.h"
#include "common/scalar.cuh"
#include "selective_state_update/cuda.h"

#include "selective_state_update/equations.h"

namespace statescan::selective_state_update::cuda {
namespace {

constexpr int kThreads = 64;  // few: a small batch spreads over more SMs
constexpr int kWarps = kThreads / 32;
constexpr unsigned kLanes = 0xffffffffu;
constexpr double kLog2e = 1.4426950408889634;

// -1: there is none.
__device__ __forceinline__ int64_t slot_at(const Params& p, int64_t b) {
  if (!p.slot_of) return b;
  const int64_t slot = p.slot_of.at(b);
  return slot < p.slots ? slot : -1;
}

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

// Some rows of the state, and what belongs to them, in a lane. T is the type of the state, X that of B and
// C. kRowDecay: A is the same for all numbers of a row. What belongs to a row as a whole, lane i of a row
// loads and computes for the i-th of its kRows, its own one, and hands to the others by shuffles.
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

  __device__ __forceinline__ void load_token(const Params& p, const Place& at, int64_t t) {
    x = dt = z = {};
    const int own = at.lane % kRows;
    if (!at.has(own)) return;
    x = at_row(p.x, at.b, t, at.head, at.row(own));
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
      const float dt_x = __shfl_sync(kLanes, own_dt_x, i, at.lanes);
      const float row_a = __shfl_sync(kLanes, own_a, i, at.lanes);
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

  __device__ __forceinline__ void store_output(const Params& p, const Place& at, int64_t t,
                                               float (&sum)[kRows]) const {
#pragma unroll 1
    for (int lanes = at.lanes / 2; lanes > 0; lanes /= 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i] += __shfl_xor_sync(kLanes, sum[i], lanes);
    }
    if (at.lane < kRows && at.has(at.lane)) {
      float y = sum[0];
#pragma unroll
      for (int i = 1; i < kRows; ++i) {
        if (i == at.lane) y = sum[i];
      }
      if (p.D) y = skip(y, D.number(p.D.dtype), x.number(p.x.dtype));
      if (p.z) y = gate(y, z.number(p.z.dtype));
      store_y(p, at, t, at.row(at.lane), y);
    }
    __syncwarp();
  }

  static __device__ __forceinline__ void store_y(const Params& p, const Place& at, int64_t t,
                                                 int64_t row, float y) {
    const View<4>& v = p.y;
    store_element(v.data, v.dtype,
                  at.b * v.stride[0] + t * v.stride[1] + at.head * v.stride[2] + row * v.stride[3],
                  y);
  }
};

// In the usual case, registers for 20 warps of an SM, or with 16-bit states, which take more, for 16: so
// 40 or 32 KiB of the state are on their way.
template <class T>
constexpr int blocks_of_sm(int packs, bool row_decay) {
  return packs > 1 || !row_decay ? 6 : sizeof(T) == 4 ? 10 : 8;
}

// What is skipped: zeros.
template <class Share>
__device__ __forceinline__ void store_nothing(const Params& p, const Place& at) {
  for (int64_t t = 0; p.compute_output && t < p.tokens; ++t) {
    if (at.lane < Share::kRows && at.has(at.lane)) {
      Share::store_y(p, at, t, at.row(at.lane), 0);
    }
  }
}

// Warp: `rounds` times kRows x places rows of one head of a batch element, all tokens. Grid over (batch,
// head, part). A row has 1 << log_lanes lanes.
template <class T, class X, int kPacks, bool kRowDecay>
__global__ __launch_bounds__(kThreads, blocks_of_sm<T>(kPacks, kRowDecay)) void rows_kernel(
    const Params p, int log_lanes, int rounds, Divisor heads, Divisor heads_of_group, Divisor parts,
    int64_t tasks) {
  using Share = Rows<T, X, kPacks, kRowDecay>;
  const int64_t stride = int64_t(gridDim.x) * kWarps;
  const int lane = int(threadIdx.x % 32), lanes = 1 << log_lanes;
  for (int64_t task = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; task < tasks;
       task += stride) {
    Place at{lanes, 32 >> log_lanes, lane & (lanes - 1)};
    int64_t part, rest;
    at.b = heads.divide(parts.divide(task, part), at.head);
    at.group = heads_of_group.divide(at.head, rest);
    const int rows = Share::kRows * at.places;
    at.first_row = part * rounds * rows + (lane >> log_lanes);
    const int64_t slot = slot_at(p, at.b);
    Share share;
    for (int round = 0; round < rounds; ++round, at.first_row += rows) {
      const int64_t left = p.headdim - at.first_row;
      at.rows = int(left < rows ? left : rows);
      if (slot < 0) {
        store_nothing<Share>(p, at);
        continue;
      }
      T* const state = Share::state_at(p, at, slot);
      if (round == 0 || p.tokens > 1) share.load_projections(p, at, 0);
      share.load_token(p, at, 0);
      share.load_parameters(p, at);
      share.load_state(p, at, state);
      for (int64_t t = 0; t < p.tokens; ++t) {
        float sum[Share::kRows];
        share.advance(p, at, sum);
        if (p.compute_output) share.store_output(p, at, t, sum);
        if (t + 1 == p.tokens) break;
        share.load_projections(p, at, t + 1);
        share.load_token(p, at, t + 1);
      }
      share.store_state(p, at, state);
    }
  }
}

// ---- any dtypes and strides

template <class R>
__device__ __forceinline__ R element(const View<4>& v, int64_t b, int64_t t, int64_t i, int64_t j) {
  return load_element<R>(v.data, v.dtype,
                         b * v.stride[0] + t * v.stride[1] + i * v.stride[2] + j * v.stride[3]);
}

template <class R>
__device__ __forceinline__ R any_step(const Params& p, int64_t b, int64_t t, int64_t head,
                                      int64_t row) {
  const View<2>& v = p.dt_bias;
  const R bias =
      v ? load_element<R>(v.data, v.dtype, head * v.stride[0] + row * v.stride[1]) : R(0);
  return step_size(element<R>(p.dt, b, t, head, row), bias, p.dt_softplus, R(p.dt_min),
                   R(p.dt_max));
}

// Warp: one row of the state of a batch element. A state that is not of the compute type is rounded once:
// every token starts again from the state before the call.
template <class R>
__global__ __launch_bounds__(kThreads) void any_kernel(const Params p, Divisor heads, Divisor rows,
                                                       int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kWarps;
  const bool in_place = p.h.dtype == p.compute;
  for (int64_t task = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; task < tasks;
       task += stride) {
    int64_t head, row;
    const int64_t b = heads.divide(rows.divide(task, row), head);
    const int64_t group = head / (p.heads / p.groups), slot = slot_at(p, b);
    const int64_t state = slot < 0 ? 0 : p.state;
    const int64_t offset = slot * p.h.stride[0] + head * p.h.stride[1] + row * p.h.stride[2];
#pragma unroll 1
    for (int64_t t = 0; t < p.tokens; ++t) {
      R sum = 0;
#pragma unroll 1
      for (int64_t n = threadIdx.x % 32; n < state; n += 32) {
        const R A = load_element<R>(p.A.data, p.A.dtype,
                                    head * p.A.stride[0] + row * p.A.stride[1] + n * p.A.stride[2]);
        R h = load_element<R>(p.h.data, p.h.dtype, offset + n * p.h.stride[3]);
#pragma unroll 1
        for (int64_t s = in_place ? t : 0; s <= t; ++s) {
          const R step = any_step<R>(p, b, s, head, row);
          h = next_state(decay(step * R(kLog2e), A), h, step * element<R>(p.x, b, s, head, row),
                         element<R>(p.B, b, s, group, n));
        }
        if (in_place || t + 1 == p.tokens) {
          store_element(p.h.data, p.h.dtype, offset + n * p.h.stride[3], h);
        }
        sum += h * element<R>(p.C, b, t, group, n);
      }
      __syncwarp();
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kLanes, sum, lanes);
      if (!p.compute_output || threadIdx.x % 32 != 0) continue;
      if (p.D && slot >= 0) {
        const R D =
            load_element<R>(p.D.data, p.D.dtype, head * p.D.stride[0] + row * p.D.stride[1]);
        sum = skip(sum, D, element<R>(p.x, b, t, head, row));
      }
      if (p.z && slot >= 0) sum = gate(sum, element<R>(p.z, b, t, head, row));
      const View<4>& v = p.y;
      store_element(v.data, v.dtype,
                    b * v.stride[0] + t * v.stride[1] + head * v.stride[2] + row * v.stride[3],
                    sum);
    }
  }
}

// ---- launches

// Starts of lines of kVec numbers are as aligned as their loads want them.
template <int kRank>
bool in_lines(const View<kRank>& v, int64_t numbers) {
  const int64_t bytes = element_bytes(v.dtype) * numbers;
  const int64_t unit = (bytes < 16 ? bytes : 16) / element_bytes(v.dtype);
  bool aligned = reinterpret_cast<uintptr_t>(v.data) % (unit * element_bytes(v.dtype)) == 0 &&
                 v.stride[kRank - 1] == 1;
  for (int i = 0; i + 1 < kRank; ++i) aligned = aligned && v.stride[i] % unit == 0;
  return aligned;
}

template <class T, class X>
bool is_fast(const Params& p) {
  constexpr int64_t kVec = kPackSize<T>;
  const bool lines = in_lines(p.h, kVec) && in_lines(p.B, kVec) && in_lines(p.C, kVec);
  const bool decays = p.A.stride[2] == 0 || (p.A.dtype == DType::kFloat32 && in_lines(p.A, kVec));
  return lines && decays && p.state % kVec == 0 && p.state <= 64 * kVec;
}

template <class T, class X, int kPacks, bool kRowDecay>
void launch_rows(const Params& p, cudaStream_t stream) {
  using Share = Rows<T, X, kPacks, kRowDecay>;
  const int64_t packs = p.state / Share::kVec;
  int log_lanes = 0;  // of a row: one at least for each of kRows
  while ((1 << log_lanes) * kPacks < packs || (1 << log_lanes) < Share::kRows) ++log_lanes;
  const int64_t rows = Share::kRows * (32 >> log_lanes), turns = (p.headdim + rows - 1) / rows;
  // More rows of a head for a warp spare it the setting up, as long as 100 warps are left for each SM.
  const int64_t spare = p.batch * p.heads * turns / (1 << 14) + 1;
  const int64_t rounds = spare < turns ? spare : turns, parts = (turns + rounds - 1) / rounds;
  const int64_t tasks = p.batch * p.heads * parts;
  launch("selective_state_update", rows_kernel<T, X, kPacks, kRowDecay>, blocks_for(tasks, kWarps),
         kThreads, 0, stream, p, log_lanes, int(rounds), Divisor(p.heads),
         Divisor(p.heads / p.groups), Divisor(parts), tasks);
}

// Whether there is a kernel of 16-byte packs for it, which then is launched.
template <class T, class X>
bool launch_fast(const Params& p, cudaStream_t stream) {
  if (!is_fast<T, X>(p)) return false;
  const bool wide = p.state > 32 * kPackSize<T>;
  if (p.A.stride[2] == 0) {
    wide ? launch_rows<T, X, 2, true>(p, stream) : launch_rows<T, X, 1, true>(p, stream);
  } else {
    wide ? launch_rows<T, X, 2, false>(p, stream) : launch_rows<T, X, 1, false>(p, stream);
  }
  return true;
}

bool launch_if_fast(const Params& p, cudaStream_t stream) {
  const DType x = p.B.dtype;
  if (p.compute != DType::kFloat32 || p.C.dtype != x) return false;
  switch (p.h.dtype) {
    case DType::kFloat32:
      if (x == DType::kFloat32) return launch_fast<float, float>(p, stream);
      if (x == DType::kBFloat16) return launch_fast<float, BFloat16>(p, stream);
      return launch_fast<float, Half>(p, stream);
    case DType::kBFloat16:
      return x == DType::kBFloat16 && launch_fast<BFloat16, BFloat16>(p, stream);
    case DType::kFloat16:
      if (x == DType::kFloat16) return launch_fast<Half, Half>(p, stream);
      return x == DType::kBFloat16 && launch_fast<Half, BFloat16>(p, stream);
    default: return false;
  }
}

}  // namespace

void update(const Params& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.heads * p.headdim;
  if (rows == 0 || p.tokens == 0 || launch_if_fast(p, stream)) return;
  launch("selective_state_update, any layout",
         p.compute == DType::kFloat64 ? any_kernel<double> : any_kernel<float>,
         blocks_for(rows, kWarps), kThreads, 0, stream, p, Divisor(p.heads), Divisor(p.headdim),
         rows);
}

}  // namespace statescan::selective_state_update::cuda
