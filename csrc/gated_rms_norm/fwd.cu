// Forward of the gated norm on the GPU. Bound by memory: each row is read once, 16 bytes at a time, and
// stays in registers from its sums to its results (team_kernel). Rows whose channels do not lie next to
// each other, whose packs are not aligned, groups that are no whole packs or more than 8192 channels,
// and doubles are read as often as they are needed, one number at a time (any_kernel).
#include "common/launch.h"
#include "gated_rms_norm/cuda.h"
#include "gated_rms_norm/rows.cuh"

namespace statescan::gated_rms_norm::cuda {
namespace {

constexpr int kThreads = 256;      // of a block of several teams
constexpr int kMostThreads = 512;  // of a block that is one team

// A pack a thread is for groups that one warp holds: such blocks are of several teams.
constexpr int block_bound(int packs) { return packs == 1 ? kThreads : kMostThreads; }

// ---- rows in registers

// y of one pack, from v - mean.
template <Gate kGate>
__device__ __forceinline__ void finish_pack(const FwdParams& p, int64_t channel, float rstd,
                                            const float (&z)[kPack], float (&v)[kPack]) {
  float weight[kPack], bias[kPack];
  load_pack(p.weight, channel, 1, weight);
  load_pack(p.bias, channel, 0, bias);
#pragma unroll
  for (int c = 0; c < kPack; ++c) {
    v[c] = v[c] * rstd * weight[c] + bias[c];
    if constexpr (kGate == Gate::kAfter) v[c] *= silu(z[c]);
  }
}

// Team: a group of a row. Grid-stride over (row, group); shared memory: a sum of each warp.
template <Gate kGate, int kPacks>
__global__ __launch_bounds__(block_bound(kPacks)) void team_kernel(const FwdParams p, Leads leads,
                                                                   Divisor groups, int team,
                                                                   int64_t items) {
  WarpSums<float>& shared = block_shared<WarpSums<float>>();
  const int teams = int(blockDim.x) / team, own = int(threadIdx.x) / team;
  const Member m{int(threadIdx.x) - own * team, team, int(p.group_size / kPack)};
  const float n = float(p.group_size);
  // Every thread of a block goes round as often: those without an item take part in the sums.
  for (int64_t first = int64_t(blockIdx.x) * teams; first < items;
       first += int64_t(gridDim.x) * teams) {
    const bool active = first + own < items;
    int64_t group = 0, item = active ? first + own : 0;
    if (groups.divisor != 1) item = groups.divide(item, group);
    const RowIndex row(leads, item);
    const int64_t channel = group * p.group_size;

    Raw<kPacks> raw_x, raw_z, raw_residual;
    load_raw(p.x.data, p.x.dtype, row.offset(p.x, channel), m, active, raw_x);
    if constexpr (kGate != Gate::kNone) {
      load_raw(p.z.data, p.z.dtype, row.offset(p.z, channel), m, active, raw_z);
    }
    float v[kPacks][kPack], z[kPacks][kPack];
    if (p.residual) {
      load_raw(p.residual.data, p.residual.dtype, row.offset(p.residual, channel), m, active,
               raw_residual);
      unpack(raw_residual, p.residual.dtype, z);
    }
    unpack(raw_x, p.x.dtype, v);
    if (p.residual) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int c = 0; c < kPack; ++c) v[i][c] += z[i][c];
      }
    }
    auto there = [&](int i) { return active && m.id + i * m.team < m.packs; };
    auto at = [&](int i) { return (m.id + i * m.team) * kPack; };
    if (p.residual_out) {
      const int64_t to = row.offset(p.residual_out, channel);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (there(i)) store_pack(p.residual_out, to + at(i), v[i]);
      }
    }
    if constexpr (kGate != Gate::kNone) unpack(raw_z, p.z.dtype, z);

    if constexpr (kGate == Gate::kBefore) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int c = 0; c < kPack; ++c)
          v[i][c] = gated_input<kGate>(v[i][c], z[i][c], sigmoid(z[i][c]));
      }
    }
    if (p.subtract_mean) {
      float mean[1] = {0};
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int c = 0; c < kPack; ++c) mean[0] += v[i][c];  // packs that are not there are 0
      }
      sum_over_team(mean, team, shared);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int c = 0; c < kPack; ++c) v[i][c] -= there(i) ? mean[0] / n : 0;
      }
    }
    float squares[1] = {0};
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) squares[0] += v[i][c] * v[i][c];
    }
    sum_over_team(squares, team, shared);
    const float rstd = 1 / std::sqrt(squares[0] / n + float(p.eps));
    const int64_t to = row.offset(p.y, channel);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!there(i)) continue;
      finish_pack<kGate>(p, channel + at(i), rstd, z[i], v[i]);
      store_pack(p.y, to + at(i), v[i]);
    }
  }
}

// ---- one number at a time

template <class R>
__device__ __forceinline__ R any_input(const FwdParams& p, const RowIndex& row, int64_t c) {
  const R x = added_input<R>(p, row, c);
  return p.gate == Gate::kBefore ? x * silu(load_from<R>(p.z, row, c, 0)) : x;
}

// Block: a group of a row. Grid-stride over (row, group); shared memory: a sum of each warp.
template <class R>
__global__ __launch_bounds__(kThreads) void any_kernel(const FwdParams p, Leads leads,
                                                       Divisor groups, int64_t items) {
  WarpSums<R>& shared = block_shared<WarpSums<R>>();
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t group;
    const RowIndex row(leads, groups.divide(item, group));
    const int64_t begin = group * p.group_size, end = begin + p.group_size;
    R mean[1] = {0}, squares[1] = {0};
    if (p.subtract_mean) {
      for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
        mean[0] += any_input<R>(p, row, c);
      }
      sum_over_team(mean, int(blockDim.x), shared);
      mean[0] /= R(p.group_size);
    }
    for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
      const R v = any_input<R>(p, row, c) - mean[0];
      squares[0] += v * v;
    }
    sum_over_team(squares, int(blockDim.x), shared);
    const R rstd = 1 / std::sqrt(squares[0] / R(p.group_size) + R(p.eps));
    for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
      const R v = any_input<R>(p, row, c) - mean[0];
      R y = v * rstd * load_from<R>(p.weight, c, 1) + load_from<R>(p.bias, c, 0);
      if (p.gate == Gate::kAfter) y *= silu(load_from<R>(p.z, row, c, 0));
      store_to(p.residual_out, row, c, added_input<R>(p, row, c));
      store_to(p.y, row, c, y);
    }
  }
}

// ---- launches

template <Gate kGate, int kPacks>
void launch_team(const FwdParams& p, cudaStream_t stream) {
  const int64_t groups = p.dim / p.group_size, items = p.rows * groups;
  const int team = team_of(p.group_size / kPack, kPacks), threads = team > 32 ? team : kThreads;
  launch("gated_rms_norm fwd, rows in registers", team_kernel<kGate, kPacks>,
         blocks_for(items, threads / team), threads, 0, stream, p, Leads(p), Divisor(groups), team,
         items);
}

bool is_fast(const FwdParams& p) {
  return p.compute == DType::kFloat32 && p.group_size % kPack == 0 &&
         p.group_size <= kMostThreads * 2 * kPack && in_packs(p.x) && in_packs(p.z) &&
         in_packs(p.residual) && in_packs(p.y) && in_packs(p.residual_out) && in_packs(p.weight) &&
         in_packs(p.bias);
}

template <class R>
void launch_any(const FwdParams& p, cudaStream_t stream) {
  const int64_t groups = p.dim / p.group_size, items = p.rows * groups;
  launch("gated_rms_norm fwd, any layout", any_kernel<R>, blocks_for(items, 1),
         p.group_size <= 64 ? 32 : kThreads, 0, stream, p, Leads(p), Divisor(groups), items);
}

}  // namespace

void fwd(const FwdParams& p, cudaStream_t stream) {
  if (p.rows * p.dim == 0) return;
  if (is_fast(p)) {
    with_gate(p.gate, [&](auto gate) {
      if (p.group_size <= 32 * kPack) {
        launch_team<gate(), 1>(p, stream);
      } else {
        launch_team<gate(), 2>(p, stream);
      }
    });
  } else {
    p.compute == DType::kFloat64 ? launch_any<double>(p, stream) : launch_any<float>(p, stream);
  }
}

}  // namespace statescan::gated_rms_norm::cuda
