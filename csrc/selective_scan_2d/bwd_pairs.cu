// Backward of the selective scan along routes with two channels to a lane and one state, see pairs.cuh for
// who does what. The rounds of a route are walked from the last to the first; each tile from the state
// that the forward saved for it: once forward for h, then back.
//
//   map --u, dy--> words --gather--> scan forward, scan back --add--> sums of du --> map
//                                      | dB, dC of every pair, ddelta of every channel
//                                      v
//                  between two rounds: dB and dC summed over the pairs, written once;
//                  ddt = dt_weight^T ddelta and, by the helpers, ddt_weight = ddelta dt^T on tensor cores
//
// ddelta and the weights come to these products as two terms of 8 bits each; dt is exact.
//
// Grid over (batch, block of pairs). Shared memory: see PairLayout; words and sums take 16 bytes for a
// token and pair.
#include "common/launch.h"
#include "selective_scan_2d/pair_rows.cuh"
#include "selective_scan_2d/pair_sums.cuh"
#include "selective_scan_2d/pairs.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

using selective_scan::step_vjp;

// What a lane sums up along a route, of each channel.
struct RouteSums {
  float dA[2] = {}, dD[2] = {}, dbias[2] = {};
};

// Step sizes are counted in units (see stage_tables): their gradients, and those of A and B, in others.
struct Units {
  float of_A, of_B, of_a, of_u;  // ddelta = of_a d/d(log a) A + of_u u d/d(delta u)
  __device__ __forceinline__ explicit Units(bool softplus)
      : of_A(softplus ? float(kLn2) : 1),
        of_B(of_A),
        of_a(softplus ? 1 : float(kLn2)),
        of_u(softplus ? float(kLog2e) : 1) {}
};

// Of both channels: a, and h after each step from `before` the first.
struct Forward {
  PairItems a, h;
  float before[2];
  Map map[2];  // of all of the lane's steps
};

__device__ __forceinline__ void walk_forward(const Member& me, float h_first, const float (&A)[2],
                                             const float (&B)[OfPair::kItems],
                                             const PairItems& delta, const PairItems& u,
                                             Forward& f) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
      f.a[c][j] = decay(delta[c][j], A[c]);
      f.h[c][j] = delta[c][j] * u[c][j] * B[j];
      f.map[c].b = f.a[c][j] * f.map[c].b + f.h[c][j];
      f.map[c].a *= f.a[c][j];
    }
  }
  ChannelScan<2, false>(me.lane, f.map).enter(h_first, f.before);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
      f.h[c][j] += f.a[c][j] * (j == 0 ? f.before[c] : f.h[c][j == 0 ? 0 : j - 1]);
    }
  }
}

// The gradient of the state after the lane's steps, of both channels, from those of all later steps.
__device__ __forceinline__ void enter_back(const BwdParams& p, const PairMemory& memory,
                                           const Member& me, const PairTile& tile, const Forward& f,
                                           const float (&C)[OfPair::kItems], const PairItems& dy,
                                           float (&dh)[2]) {
  Map map[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    map[c].a = f.map[c].a;
#pragma unroll
    for (int j = OfPair::kItems - 1; j >= 0; --j) {
      map[c].b = f.a[c][j] * (map[c].b + C[j] * dy[c][j]);
    }
  }
  const ChannelScan<2, true> scan(me.lane, map);
  if (scan.is_last()) put_map(memory, me, me.map, scan.all);
  auto* table = memory.get<float>(tile.table) + kItemStates * 2;
  auto dh_at = [&](int turn) -> float& { return table[(kItemH + turn) * 2 + me.lane % 2]; };
  float end = dh_at(tile.turn);
  const float start = start_of_tile<true>(memory, me, me.map, end);
  if (me.i == 0 && me.lane < 2) {
    dh_at(tile.turn ^ 1) = end;
    const Task& task = memory.now().task;
    const int64_t channel = task.channel + me.pair * 2 + me.lane;
    const View<4>& x = p.dinitial_state;
    if (x && tile.last && channel < p.dim) {
      store_element(x.data, x.dtype, state_offset(x, task.b, tile.route, channel), end);
    }
  }
  scan.enter(start, dh);
}

__device__ __forceinline__ void walk_tile(const BwdParams& p, const PairMemory& memory,
                                          const Member& me, const PairTile& tile, RouteSums& sums) {
  const PairLayout& layout = memory.at;
  const Task& task = memory.now().task;
  auto* table = memory.get<float>(tile.table);
  int64_t channel = task.channel + me.pair * 2 + me.lane % 2;
  if (channel >= p.dim) channel = p.dim - 1;  // whatever it has, dy and dh of it are zero
  const int64_t row = (task.b * p.routes + tile.route) * p.tiles + tile.i;
  const float h_first = __ldg(static_cast<const float*>(p.chunk_states) + row * p.dim + channel);
  int at[OfPair::kItems];
  PairItems delta, slope, u, dy;
  multiply_ranks<2>(memory, me, tile.rows, memory.get<uint32_t>(tile.weight),
                    FirstSums<2>(table + kItemBias * 2), delta);
  load_steps(memory, tile.rows + layout.place, me, at);
  find_step_sizes_of_pair<2>(p.delta_softplus, tile.flags, at, delta, slope);
  gather_numbers(memory, me.words, tile.flags, p.u.dtype, at, u);
  gather_numbers(memory, me.words - layout.words + layout.dy, tile.flags, p.dy.dtype, at, dy);
  float B[OfPair::kItems], C[OfPair::kItems];
  load_steps(memory, tile.rows + layout.B, me, B);
  load_steps(memory, tile.rows + layout.C, me, C);
  const auto A = several<2>(table[(kItemStates + kItemA) * 2]), D = several<2>(table[kItemD * 2]);
  const Units units(p.delta_softplus);
  Forward f;
  walk_forward(me, h_first, A.x, B, delta, u, f);
  float dh[2], dB[OfPair::kItems], dC[OfPair::kItems];
  auto share = [&](int which) {
    return memory.get<Several<float, 4>>(share_of_pair(memory, which, me.pair) + me.row);
  };
  enter_back(p, memory, me, tile, f, C, dy, dh);
#pragma unroll
  for (int j = OfPair::kItems - 1; j >= 0; --j) {
    dB[j] = dC[j] = 0;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float dB_c, dC_c, d_delta = 0, d_delta_u = 0;
      step_vjp(f.a[c][j], j == 0 ? f.before[c] : f.h[c][j == 0 ? 0 : j - 1], f.h[c][j], delta[c][j],
               delta[c][j] * u[c][j], A.x[c], B[j], C[j], dy[c][j], dh[c], sums.dA[c], dB_c, dC_c,
               d_delta, d_delta_u);
      dB[j] += dB_c, dC[j] += dC_c;
      // The slope becomes ddelta, delta becomes du.
      slope[c][j] *= units.of_a * d_delta + units.of_u * u[c][j] * d_delta_u;
      delta[c][j] = D.x[c] * dy[c][j] + delta[c][j] * d_delta_u;
      sums.dD[c] += dy[c][j] * u[c][j];
      sums.dbias[c] += slope[c][j];
    }
    dB[j] *= units.of_B;
    if (j % 4 > 0) continue;  // a pack is complete
    share(0)[j / 4 * 32] = {{dB[j], dB[j + 1], dB[j + 2], dB[j + 3]}};
    share(1)[j / 4 * 32] = {{dC[j], dC[j + 1], dC[j + 2], dC[j + 3]}};
  }
  const int pitch = ddelta_pitch(OfPair::kSteps * layout.team);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    BFloat16* to = ddelta_of(memory, me.pair / kPairsOfGroup) +
                   (me.pair % kPairsOfGroup * 2 + c) * pitch + me.i * OfPair::kSteps + me.lane * 8;
    store_terms(slope[c], reinterpret_cast<uint4*>(to), reinterpret_cast<uint4*>(to + 8 * pitch));
  }
  load_steps(memory, tile.rows + layout.place, me, at);
  add_to_sums<2>(memory, tile.flags, at, me,
                 [&](float sum, int j, int c) { return sum + delta[c][j]; });
}

__device__ __forceinline__ float* team_sums(const PairMemory& memory, int route, const Member& me,
                                            int member) {
  const PairLayout& at = memory.at;
  return memory.get<float>(at.team_sums) +
         (((route & 1) * at.pairs + me.pair) * at.team + member) * kTeamSums;
}

// Of a route: dA, dD and dbias of a pair, over its team.
__device__ __forceinline__ void write_team_sums(const BwdParams& p, const PairMemory& memory,
                                                const Member& me, int route) {
  const Task& task = memory.now().task;
  const int kind = me.lane / 2;
  const int64_t channel = task.channel + me.pair * 2 + me.lane % 2;
  if (me.lane >= 6 || channel >= p.dim) return;
  float sum = 0;
  for (int member = 0; member < memory.at.team; ++member) {
    sum += team_sums(memory, route, me, member)[me.lane];
  }
  void* to = kind == kSumA ? p.dA : kind == kSumD ? p.dD : p.ddelta_bias;
  if ((kind == kSumD && !p.D) || (kind == kSumBias && !p.delta_bias)) return;
  if (kind == kSumA) sum *= Units(p.delta_softplus).of_A;
  static_cast<float*>(to)[(task.b * p.routes + route) * p.dim + channel] = sum;
}

// All routes of a block's channels, see the forward's.
__device__ __forceinline__ void walk_routes(const BwdParams& p, const PairMemory& memory) {
  const Member me(memory);
  const bool there = me.pair * 2 < memory.now().task.channels;
  const int rounds = p.plan.pair.rounds, tiles = int(p.tiles);
  int number = 0;
  __syncthreads();  // words, sums and the first round are in place
#pragma unroll 1
  for (int route = 0; route < int(p.routes); ++route) {
    RouteSums sums;
#pragma unroll 1
    for (int k = 0; k < rounds; ++k, ++number) {
      const int i = rounds - 1 - k, tile = i * memory.at.team + me.i;
      const int flags = memory.flags(number);
      if (there && tile < tiles) {
        walk_tile(p, memory, me,
                  {route, tile, flags, k & 1, i == 0, memory.rows(number),
                   memory.table(route, me.pair), memory.weight(route, me.pair)},
                  sums);
      } else if (there) {
        walk_no_tile(memory, me, 1, flags);
      }
      if (there && i == 0) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float of_lane[3] = {sums.dA[c], sums.dD[c], sums.dbias[c]};
#pragma unroll
          for (int kind = 0; kind < 3; ++kind) {
            const float sum = sum_over_warp(of_lane[kind]);
            if (me.lane == 0) team_sums(memory, route, me, me.i)[kind * 2 + c] = sum;
          }
        }
      }
      __syncthreads();  // this round has been walked, the next is in place
      const Round r = round_at(p, memory.now().task.b, route, i);
      write_shares(p, memory, r);
      write_ddt(p, memory, r, Units(p.delta_softplus).of_B);
      if (there && i == 0 && me.i == 0) write_team_sums(p, memory, me, route);
      __syncthreads();  // the shares of this round have been read
    }
  }
}

__global__ __launch_bounds__(kPairThreads<true, 2>,
                             1) void bwd_pairs_kernel(const __grid_constant__ BwdParams p) {
  const PairMemory memory(p);
  const PairLayout& at = p.plan.pair;
  const bool helps = int(threadIdx.x) >= 32 * at.pairs * at.team;
  if (threadIdx.x == 0) memory.now().task = task_at(p, blockIdx.x);
  __syncthreads();  // the task is known
  const Task& task = memory.now().task;
  // What no channel writes is read as zero: words, and ddelta of a group that is not full.
  clear(memory.get<uint32_t>(at.words), at.pairs * at.pitch, int(blockDim.x));
  clear(memory.get<uint32_t>(at.sums), at.pairs * at.pitch * 2, int(blockDim.x));
  clear(memory.get<uint32_t>(at.dy), at.pairs * at.pitch, int(blockDim.x));
  clear(memory.get<uint32_t>(at.ddelta), (at.team_sums - at.ddelta) / 4, int(blockDim.x));
  __syncthreads();  // all is zero
  auto read = [&](const View<4>& x, int words) {
    read_halves(x, task, 0, p.tokens, int(blockDim.x), [&](int c, int t) -> uint16_t& {
      return memory.get<uint16_t>(words)[(c / 2 * at.pitch + at.position(t)) * 2 + c % 2];
    });
  };
  read(p.u, at.words);
  read(p.dy, at.dy);
  if (helps) {
    const int helper = int(threadIdx.x) / 32 - at.pairs * at.team;
    stage_routes(p, memory, p.dlast_state, true, [&](const Round& r, int number, bool last) {
      add_to_dt_weight(p, memory, r, number, helper);
      __syncthreads();  // the shares of this round have been read
      if (last && helper == 0) write_dt_weight(p, memory, r.route);
    });
  } else {
    walk_routes(p, memory);
  }
  write_tokens(p.du, task, 0, p.tokens, PairSums<2>(memory));
}

}  // namespace

void bwd_pairs(const BwdParams& p, cudaStream_t stream) {
  const PairLayout& at = p.plan.pair;
  launch("selective_scan_2d bwd pairs", bwd_pairs_kernel, p.plan.grid,
         32 * (at.pairs * at.team + at.helpers), size_t(p.plan.shared_bytes), stream, p);
}

}  // namespace statescan::selective_scan_2d::cuda
