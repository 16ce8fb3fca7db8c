// Forward of the selective scan along routes with two channels to a lane, see pairs.cuh for who does
// what.
//
//   map --u--> words --gather--> scan of a round --add--> sums of y --gate--> map
//                                  ^ places, dt, B, C of the round, from two warps apart
//
// Grid over (batch, block of pairs). Shared memory: see PairLayout; words and sums take 12 bytes for a
// token and pair.
#include "common/launch.h"
#include "selective_scan_2d/pair_rows.cuh"
#include "selective_scan_2d/pairs.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

// What the state is before the tile and, of the first member, after the last round.
__device__ __forceinline__ void store_states(const FwdParams& p, const PairMemory& memory,
                                             const Member& me, const PairTile& tile, int n,
                                             float start, float end) {
  if (p.chunk_states == nullptr && !tile.last) return;
  const Task& task = memory.now().task;
  const int64_t channel = task.channel + me.pair * 2 + me.lane;
  if (me.lane >= 2 || channel >= p.dim) return;
  if (p.chunk_states != nullptr) {
    const int64_t row = (task.b * p.routes + tile.route) * p.tiles + tile.i;
    static_cast<float*>(p.chunk_states)[(row * p.state + n) * p.dim + channel] = start;
  }
  if (!tile.last || me.i > 0) return;
  const View<4>& x = p.last_state;
  store_element(x.data, x.dtype, state_offset(x, task.b, tile.route, channel) + n * x.stride[3],
                end);
}

// One state of both channels along a tile. y += C h
__device__ __forceinline__ void walk_state(const FwdParams& p, const PairMemory& memory,
                                           const Member& me, const PairTile& tile, int n,
                                           const PairItems& delta, const PairItems& delta_u,
                                           PairItems& y) {
  const PairLayout& at = memory.at;
  const int row = tile.rows + n * at.buffer_tiles * OfPair::kSteps * 4;
  // (item, channel); h in turns: a member may still read what the first leaves for the next round.
  auto* table = memory.get<float>(tile.table) + (kItemStates + kStateItems * n) * 2;
  auto h_at = [&](int turn) -> float& { return table[(kItemH + turn) * 2 + me.lane % 2]; };
  PairItems a, b;
  Map map[2];
  float B[OfPair::kItems];
  load_steps(memory, row + at.B, me, B);
  const auto A = several<2>(table[kItemA * 2]);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
      a[c][j] = decay(delta[c][j], A.x[c]);
      b[c][j] = delta_u[c][j] * B[j];
      map[c].b = a[c][j] * map[c].b + b[c][j];
      map[c].a *= a[c][j];
    }
  }
  const ChannelScan<2, false> scan(me.lane, map);
  const int maps = maps_of_turn(memory, me, n);
  if (scan.is_last()) put_map(memory, me, maps, scan.all);
  float h = h_at(tile.turn);
  const float start = start_of_tile<false>(memory, me, maps, h);
  if (me.i == 0 && me.lane < 2) h_at(tile.turn ^ 1) = h;
  store_states(p, memory, me, tile, n, start, h);
  float h_step[2], C[OfPair::kItems];
  scan.enter(start, h_step);
  load_steps(memory, row + at.C, me, C);
#pragma unroll
  for (int j = 0; j < OfPair::kItems; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      h_step[c] = a[c][j] * h_step[c] + b[c][j];
      y[c][j] += C[j] * h_step[c];
    }
  }
}

__device__ __forceinline__ void walk_tile(const FwdParams& p, const PairMemory& memory,
                                          const Member& me, const PairTile& tile) {
  auto* table = memory.get<float>(tile.table);
  int at[OfPair::kItems];
  PairItems delta, delta_u, y, slope;
  multiply_ranks<2>(memory, me, tile.rows, memory.get<uint32_t>(tile.weight),
                    FirstSums<2>(table + kItemBias * 2), delta);
  load_steps(memory, tile.rows + memory.at.place, me, at);
  find_step_sizes_of_pair<2>(p.delta_softplus, tile.flags, at, delta, slope);
  gather_numbers(memory, me.words, tile.flags, p.u.dtype, at, y);
  const auto D = several<2>(table[kItemD * 2]);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
      delta_u[c][j] = delta[c][j] * y[c][j];
      y[c][j] *= D.x[c];
    }
  }
#pragma unroll 1
  for (int n = 0; n < int(p.state); ++n) {
    walk_state(p, memory, me, tile, n, delta, delta_u, y);
  }
  // Again, rather than kept in registers while states are walked.
  load_steps(memory, tile.rows + memory.at.place, me, at);
  const auto weight = several<2>(table[kItemWeight * 2]);
  add_to_sums<2>(memory, tile.flags, at, me,
                 [&](float sum, int j, int c) { return sum + weight.x[c] * y[c][j]; });
}

// All routes of a block's channels. Warps with and without channels have loops of their own, which meet
// at the end of every round, so that neither's registers are full of what the other needs.
__device__ __forceinline__ void walk_routes(const FwdParams& p, const PairMemory& memory) {
  const Member me(memory);
  const bool there = me.pair * 2 < memory.now().task.channels;
  const int rounds = p.plan.pair.rounds, tiles = int(p.tiles);
  int round = 0;
  __syncthreads();  // words, sums and the first round are in place
#pragma unroll 1
  for (int route = 0; route < int(p.routes); ++route) {
    const int table = ptx::opaque(memory.table(route, me.pair));
    const int weight = ptx::opaque(memory.weight(route, me.pair));
#pragma unroll 1
    for (int i = 0; i < rounds; ++i, ++round) {
      const int tile = i * memory.at.team + me.i, flags = memory.flags(round);
      if (there && tile < tiles) {
        walk_tile(p, memory, me,
                  {route, tile, flags, i & 1, i + 1 == rounds, memory.rows(round), table, weight});
      } else if (there) {
        walk_no_tile(memory, me, int(p.state), flags);
      }
      __syncthreads();  // this round has been read, the next is in place
    }
  }
}

__global__ __launch_bounds__(kPairThreads<false, 2>,
                             1) void fwd_pairs_kernel(const __grid_constant__ FwdParams p) {
  const PairMemory memory(p);
  const PairLayout& at = p.plan.pair;
  const bool helps = int(threadIdx.x) >= 32 * at.pairs * at.team;
  if (threadIdx.x == 0) memory.now().task = task_at(p, blockIdx.x);
  __syncthreads();  // the task is known
  const Task& task = memory.now().task;
  if (task.channels < 2 * at.pairs) {
    clear(memory.get<uint32_t>(memory.words(task.channels / 2)), at.pitch,
          int(blockDim.x));  // of one channel or none
    __syncthreads();         // it is zero
  }
  read_halves(p.u, task, 0, p.tokens, int(blockDim.x), [&](int c, int t) -> uint16_t& {
    return memory.get<uint16_t>(memory.words(c / 2))[at.position(t) * 2 + c % 2];
  });
  clear(memory.get<uint32_t>(at.sums), at.pairs * at.pitch * 2, int(blockDim.x));
  helps ? stage_routes(p, memory, p.initial_state, false, [](const Round&, int, bool) {})
        : walk_routes(p, memory);
  const PairSums<2> y(memory);
  if (p.z) {
    read_tokens(with_routes(p.z), task, 0, p.tokens, Meet::kTimesSilu, y);
    __syncthreads();  // y is gated
  }
  write_tokens(p.y, task, 0, p.tokens, y);
}

}  // namespace

void fwd_pairs(const FwdParams& p, cudaStream_t stream) {
  const PairLayout& at = p.plan.pair;
  launch("selective_scan_2d fwd pairs", fwd_pairs_kernel, p.plan.grid,
         32 * (at.pairs * at.team + at.helpers), size_t(p.plan.shared_bytes), stream, p);
}

}  // namespace statescan::selective_scan_2d::cuda
