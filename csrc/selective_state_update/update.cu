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
#include "common/divisor.h"
#include "common/launch.h"
#include "selective_state_update/rows.cuh"

namespace statescan::selective_state_update::cuda {
namespace {

constexpr int kThreads = 64;  // few: a small batch spreads over more SMs
constexpr int kWarps = kThreads / 32;

// In the usual case, registers for 20 warps of an SM, or with 16-bit states, which take more, for 16: so
// 40 or 32 KiB of the state are on their way.
template <class T>
constexpr int blocks_of_sm(int packs, bool row_decay) {
  return packs > 1 || !row_decay ? 6 : sizeof(T) == 4 ? 10 : 8;
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
    const int64_t slot = slot_at(p.slot_of, p.slots, at.b);
    Share share;
    for (int round = 0; round < rounds; ++round, at.first_row += rows) {
      const int64_t left = p.headdim - at.first_row;
      at.rows = int(left < rows ? left : rows);
      if (slot < 0) {
        share.store_nothing(p, at);
        continue;
      }
      T* const state = Share::state_at(p, at, slot);
      if (round == 0 || p.tokens > 1) share.load_projections(p, at, 0);
      share.load_x(p, at, 0);
      share.load_token(p, at, 0);
      share.load_parameters(p, at);
      share.load_state(p, at, state);
      for (int64_t t = 0; t < p.tokens; ++t) {
        float sum[Share::kRows];
        share.advance(p, at, sum);
        if (p.compute_output) share.store_output(p, at, t, sum);
        if (t + 1 == p.tokens) break;
        share.load_projections(p, at, t + 1);
        share.load_x(p, at, t + 1);
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
    const int64_t group = head / (p.heads / p.groups), slot = slot_at(p.slot_of, p.slots, b);
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
      sum = sum_over_warp(sum);
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
