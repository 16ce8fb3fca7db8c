// Backward of the gated norm on the GPU, from nothing but the inputs. As in the forward, each row is
// read once and stays in registers: sums over the group first, then the gradients.
//
//   block    a part of the rows, of one group of channels. Its teams take the rows of the part in turn
//            and keep their sums of dweight and dbias in registers; at the end the teams' sums are
//            added in their order, and are a row of `partial`.
//   sums     the rows of `partial` are added up in an order that only depends on how many there are.
//
// Nothing is atomic: the gradients are the same bits in every run.
#include "common/launch.h"
#include "gated_rms_norm/cuda.h"
#include "gated_rms_norm/rows.cuh"

namespace statescan::gated_rms_norm::cuda {
namespace {

constexpr int kThreads = 256;                         // of a block of several teams
constexpr int kMostThreads = 512;                     // of a block that is one team
constexpr int kPacks = 2;                             // of a thread
constexpr int kRowGroup = kThreads * kPacks * kPack;  // channels of all teams of a block together

// The rows as parts of nearly the same size.
struct Parts {
  int64_t count, base, extra;  // the first `extra` parts have one row more than `base`

  Parts(int64_t rows, int64_t count) : count(count), base(rows / count), extra(rows % count) {}
  STATESCAN_HOST_DEVICE int64_t begin(int64_t part) const {
    return base * part + (part < extra ? part : extra);
  }
};

// ---- rows in registers

struct Shared {
  WarpSums<float> sums;
  SharedArray<float, kRowGroup> dweight, dbias;  // of each team, one after the other
};

// The operands of a row and the numbers that the gradients of all its channels need.
struct RowSums {
  float mean, rstd, mean_dxhat, mean_dot;
};

template <Gate kGate>
struct Walk {
  float x[kPacks][kPack], z[kPacks][kPack], dy[kPacks][kPack];

  __device__ __forceinline__ void load(const BwdParams& p, const RowIndex& row, int64_t channel,
                                       const Member& m, bool active) {
    Raw<kPacks> raw_x, raw_z, raw_dy;
    load_raw(p.x.data, p.x.dtype, row.offset(p.x, channel), m, active, raw_x);
    if constexpr (kGate != Gate::kNone) {
      load_raw(p.z.data, p.z.dtype, row.offset(p.z, channel), m, active, raw_z);
    }
    load_raw(p.dy.data, p.dy.dtype, row.offset(p.dy, channel), m, active && p.dy, raw_dy);
    unpack(raw_x, p.x.dtype, x);
    if constexpr (kGate != Gate::kNone) unpack(raw_z, p.z.dtype, z);
    unpack(raw_dy, p.dy.dtype, dy);
    if (!p.residual) return;
    load_raw(p.residual.data, p.residual.dtype, row.offset(p.residual, channel), m, active, raw_x);
    float residual[kPacks][kPack];
    unpack(raw_x, p.residual.dtype, residual);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) x[i][c] += residual[i][c];
    }
  }

  __device__ __forceinline__ float gate(int i, int c) const {
    return kGate == Gate::kNone ? 0 : sigmoid(z[i][c]);
  }
  __device__ __forceinline__ float input(int i, int c, float s) const {
    return gated_input<kGate>(x[i][c], z[i][c], s);
  }

  __device__ __forceinline__ RowSums sums(const BwdParams& p, int64_t channel, const Member& m,
                                          bool active, WarpSums<float>& shared) const {
    const float n = float(p.group_size);
    float mean[1] = {0};
    if (p.subtract_mean) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int c = 0; c < kPack; ++c) mean[0] += input(i, c, gate(i, c));
      }
      sum_over_team(mean, m.team, shared);
      mean[0] /= n;
    }
    float sum[3] = {0, 0, 0};  // of (v - mean)^2, dxhat, dxhat (v - mean)
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!active || m.id + i * m.team >= m.packs) continue;
      float weight[kPack];
      load_pack(p.weight, channel + (m.id + i * m.team) * kPack, 1, weight);
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        const float s = gate(i, c), v = input(i, c, s) - mean[0];
        const float dxhat = norm_output_vjp<kGate>(dy[i][c], z[i][c], s) * weight[c];
        sum[0] += v * v, sum[1] += dxhat, sum[2] += dxhat * v;
      }
    }
    sum_over_team(sum, m.team, shared);
    const float rstd = 1 / std::sqrt(sum[0] / n + float(p.eps));
    return {mean[0], rstd, p.subtract_mean ? sum[1] / n : 0, sum[2] * rstd / n};
  }

  // The gradients of one pack, which are stored, and added to those of the parameters.
  __device__ __forceinline__ void finish(const BwdParams& p, const RowIndex& row, int64_t channel,
                                         int i, const RowSums& sums, float (&dweight)[kPack],
                                         float (&dbias)[kPack]) const {
    float weight[kPack], bias[kPack], dx[kPack], dz[kPack];
    load_pack(p.weight, channel, 1, weight);
    load_pack(p.bias, channel, 0, bias);
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      const float s = gate(i, c), xhat = (input(i, c, s) - sums.mean) * sums.rstd;
      const float dn = norm_output_vjp<kGate>(dy[i][c], z[i][c], s);
      const float dv = norm_vjp(dn * weight[c], xhat, sums.rstd, sums.mean_dxhat, sums.mean_dot);
      gate_vjp<kGate>(x[i][c], z[i][c], s, xhat * weight[c] + bias[c], dy[i][c], dv, dx[c], dz[c]);
      dweight[c] += dn * xhat;
      dbias[c] += dn;
    }
    if (p.dresidual_out) {
      const Rows& added = p.dresidual_out;
      Raw<1> raw;
      load_raw(added.data, added.dtype, row.offset(added, channel), Member{0, 1, 1}, true, raw);
      float more[1][kPack];
      unpack(raw, added.dtype, more);
#pragma unroll
      for (int c = 0; c < kPack; ++c) dx[c] += more[0][c];
    }
    store_pack(p.dx, row.offset(p.dx, channel), dx);
    if constexpr (kGate != Gate::kNone) store_pack(p.dz, row.offset(p.dz, channel), dz);
    if (p.dresidual) store_pack(p.dresidual, row.offset(p.dresidual, channel), dx);
  }
};

// The block's sums of its channels: those of each team in turn.
__device__ __forceinline__ void store_parameter_sums(const BwdParams& p, int64_t part,
                                                     int64_t channel, const Member& m, int own,
                                                     int teams, Shared& shared,
                                                     const float (&dweight)[kPacks][kPack],
                                                     const float (&dbias)[kPacks][kPack]) {
  if (p.partial == nullptr) return;
  float* to = static_cast<float*>(p.partial) + part * 2 * p.dim + channel;
  const int n = int(p.group_size);
  __syncthreads();  // the sums of the task before have been added up
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int pack = m.id + i * m.team;
    if (pack >= m.packs) continue;
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      if (teams > 1) {
        shared.dweight[own * n + pack * kPack + c] = dweight[i][c];
        shared.dbias[own * n + pack * kPack + c] = dbias[i][c];
      } else {
        to[pack * kPack + c] = dweight[i][c], to[p.dim + pack * kPack + c] = dbias[i][c];
      }
    }
  }
  if (teams == 1) return;
  __syncthreads();  // the sums of all teams are written
  for (int c = threadIdx.x; c < n; c += blockDim.x) {
    float sum_weight = 0, sum_bias = 0;
    for (int i = 0; i < teams; ++i) {
      sum_weight += shared.dweight[i * n + c], sum_bias += shared.dbias[i * n + c];
    }
    to[c] = sum_weight, to[p.dim + c] = sum_bias;
  }
}

// Block: a part of the rows, of a group of channels. Grid-stride over (part, group); shared memory: the
// teams' sums of the parameters' gradients.
template <Gate kGate>
__global__ __launch_bounds__(kMostThreads, 1) void team_kernel(const BwdParams p, Leads leads,
                                                               Divisor groups, int team,
                                                               Parts parts, int64_t tasks) {
  Shared& shared = block_shared<Shared>();
  const int teams = int(blockDim.x) / team, own = int(threadIdx.x) / team;
  const Member m{int(threadIdx.x) - own * team, team, int(p.group_size / kPack)};
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t group;
    const int64_t part = groups.divide(task, group), channel = group * p.group_size;
    float dweight[kPacks][kPack], dbias[kPacks][kPack];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) dweight[i][c] = dbias[i][c] = 0;
    }
    // Every team goes round as often: one without a row takes part in the sums.
    const int64_t end = parts.begin(part + 1);
    for (int64_t first = parts.begin(part); first < end; first += teams) {
      const bool active = first + own < end;
      const RowIndex row(leads, active ? first + own : first);
      Walk<kGate> walk;
      walk.load(p, row, channel, m, active);
      const RowSums sums = walk.sums(p, channel, m, active, shared.sums);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int pack = m.id + i * m.team;
        if (!active || pack >= m.packs) continue;
        walk.finish(p, row, channel + pack * kPack, i, sums, dweight[i], dbias[i]);
      }
    }
    store_parameter_sums(p, part, channel, m, own, teams, shared, dweight, dbias);
  }
}

// ---- one number at a time

// What a channel's gradients start from.
template <class R>
struct Number {
  R x, z, s, v, dy, dn;

  __device__ __forceinline__ Number(const BwdParams& p, const RowIndex& row, int64_t c) {
    x = added_input<R>(p, row, c);
    z = load_from<R>(p.z, row, c, 0), s = sigmoid(z);
    dy = load_from<R>(p.dy, row, c, 0);
    v = p.gate == Gate::kBefore ? gated_input<Gate::kBefore>(x, z, s) : x;
    dn = p.gate == Gate::kAfter ? norm_output_vjp<Gate::kAfter>(dy, z, s) : dy;
  }
  __device__ __forceinline__ void gate(Gate gate, R n, R dv, R& dx, R& dz) const {
    if (gate == Gate::kBefore) {
      gate_vjp<Gate::kBefore>(x, z, s, n, dy, dv, dx, dz);
    } else {
      gate_vjp<Gate::kAfter>(x, z, s, n, dy, dv, dx, dz);  // or there is no z
    }
  }
};

// One row of a group. `sums` is where this part's dweight and dbias of the group are.
template <class R>
__device__ __forceinline__ void any_row(const BwdParams& p, const RowIndex& row, int64_t begin,
                                        WarpSums<R>& shared, bool first, R* sums) {
  const int64_t end = begin + p.group_size;
  const int team = int(blockDim.x);
  const R n = R(p.group_size);
  R mean[1] = {0}, sum[3] = {0, 0, 0};
  if (p.subtract_mean) {
    for (int64_t c = begin + threadIdx.x; c < end; c += team) mean[0] += Number<R>(p, row, c).v;
    sum_over_team(mean, team, shared);
    mean[0] /= n;
  }
#pragma unroll 1
  for (int64_t c = begin + threadIdx.x; c < end; c += team) {
    const Number<R> at(p, row, c);
    const R v = at.v - mean[0], dxhat = at.dn * load_from<R>(p.weight, c, 1);
    sum[0] += v * v, sum[1] += dxhat, sum[2] += dxhat * v;
  }
  sum_over_team(sum, team, shared);
  const R rstd = 1 / std::sqrt(sum[0] / n + R(p.eps));
  const R mean_dxhat = p.subtract_mean ? sum[1] / n : 0, mean_dot = sum[2] * rstd / n;
#pragma unroll 1
  for (int64_t c = begin + threadIdx.x; c < end; c += team) {
    const Number<R> at(p, row, c);
    const R weight = load_from<R>(p.weight, c, 1), xhat = (at.v - mean[0]) * rstd;
    const R dv = norm_vjp(at.dn * weight, xhat, rstd, mean_dxhat, mean_dot);
    R dx, dz = 0;
    at.gate(p.gate, xhat * weight + load_from<R>(p.bias, c, 0), dv, dx, dz);
    dx += load_from<R>(p.dresidual_out, row, c, 0);
    store_to(p.dx, row, c, dx);
    store_to(p.dz, row, c, dz);
    store_to(p.dresidual, row, c, dx);
    if (sums == nullptr) continue;
    sums[c] = (first ? 0 : sums[c]) + at.dn * xhat;
    sums[p.dim + c] = (first ? 0 : sums[p.dim + c]) + at.dn;
  }
}

// Block: a part of the rows, of a group of channels. Grid-stride over (part, group).
template <class R>
__global__ __launch_bounds__(kThreads) void any_kernel(const BwdParams p, Leads leads,
                                                       Divisor groups, Parts parts, int64_t tasks) {
  WarpSums<R>& shared = block_shared<WarpSums<R>>();
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t group;
    const int64_t part = groups.divide(task, group), begin = parts.begin(part);
    const int64_t end = parts.begin(part + 1);
    R* sums = static_cast<R*>(p.partial) + part * 2 * p.dim;
    for (int64_t r = begin; r < end; ++r) {
      any_row(p, RowIndex(leads, r), group * p.group_size, shared, r == begin,
              p.partial ? sums : nullptr);
    }
  }
}

// ---- sums of the parts

constexpr int kColumns = 32, kSlices = kThreads / kColumns;

template <class R>
struct Slices {
  SharedArray<R, kThreads> sum;
};

// Block: kColumns numbers of (2, dim); thread: every kSlices-th part of one of them. The slices are added
// in their order.
template <class R>
__global__ __launch_bounds__(kThreads) void sum_kernel(const BwdParams p, int64_t parts,
                                                       int64_t tasks) {
  Slices<R>& shared = block_shared<Slices<R>>();
  const int column = int(threadIdx.x) % kColumns, slice = int(threadIdx.x) / kColumns;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t at = task * kColumns + column;
    R sum = 0;
    if (at < 2 * p.dim) {
      const R* partial = static_cast<const R*>(p.partial) + at;
#pragma unroll 4
      for (int64_t i = slice; i < parts; i += kSlices) sum += partial[i * 2 * p.dim];
    }
    __syncthreads();  // the slices of the task before have been read
    shared.sum[int(threadIdx.x)] = sum;
    __syncthreads();  // all slices are written
    if (slice != 0 || at >= 2 * p.dim) continue;
    for (int i = 1; i < kSlices; ++i) sum += shared.sum[i * kColumns + column];
    const View<1>& to = at < p.dim ? p.dweight : p.dbias;
    const int64_t c = at < p.dim ? at : at - p.dim;
    if (to) store_element(to.data, to.dtype, c * to.stride[0], sum);
  }
}

// ---- launches

bool is_fast(const BwdParams& p) {
  return p.compute == DType::kFloat32 && p.group_size % kPack == 0 &&
         p.group_size <= kMostThreads * kPacks * kPack && in_packs(p.x) && in_packs(p.z) &&
         in_packs(p.residual) && in_packs(p.dy) && in_packs(p.dresidual_out) && in_packs(p.dx) &&
         in_packs(p.dz) && in_packs(p.dresidual) && in_packs(p.weight) && in_packs(p.bias);
}

void launch_team(const BwdParams& p, cudaStream_t stream) {
  const int64_t groups = p.dim / p.group_size, parts = p.parts(), tasks = parts * groups;
  const int team = team_of(p.group_size / kPack, kPacks), threads = team > 32 ? team : kThreads;
  with_gate(p.gate, [&](auto gate) {
    launch("gated_rms_norm bwd, rows in registers", team_kernel<gate()>, blocks_for(tasks, 1),
           threads, 0, stream, p, Leads(p), Divisor(groups), team, Parts(p.rows, parts), tasks);
  });
}

template <class R>
void launch_any(const BwdParams& p, cudaStream_t stream) {
  const int64_t groups = p.dim / p.group_size, parts = p.parts(), tasks = parts * groups;
  launch("gated_rms_norm bwd, any layout", any_kernel<R>, blocks_for(tasks, 1),
         p.group_size <= 64 ? 32 : kThreads, 0, stream, p, Leads(p), Divisor(groups),
         Parts(p.rows, parts), tasks);
}

template <class R>
void launch_sums(const BwdParams& p, cudaStream_t stream) {
  const int64_t tasks = (2 * p.dim - 1) / kColumns + 1;
  launch("gated_rms_norm bwd, sums", sum_kernel<R>, blocks_for(tasks, 1), kThreads, 0, stream, p,
         p.rows > 0 ? p.parts() : 0, tasks);
}

}  // namespace

void bwd(const BwdParams& p, cudaStream_t stream) {
  if (p.dim == 0) return;
  const bool wide = p.compute == DType::kFloat64;
  if (p.rows > 0) {
    if (is_fast(p)) {
      launch_team(p, stream);
    } else {
      wide ? launch_any<double>(p, stream) : launch_any<float>(p, stream);
    }
  }
  if (!p.dweight && !p.dbias) return;
  wide ? launch_sums<double>(p, stream) : launch_sums<float>(p, stream);
}

}  // namespace statescan::gated_rms_norm::cuda
