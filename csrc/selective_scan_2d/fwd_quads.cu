// Forward of the selective scan along routes with four channels to a lane and one state, see pairs.cuh for
// who does what.
//
//   map --u--> words --gather--> scan of a tile --add--> sums of y --gate--> map
//                                  ^ places, dt, B, C of the tile
//
// Helpers and teams go on by themselves: a tile's rows come to one of some buffers, which is full for the
// quads that read it, and free when each of them has found from it all that it needs. The parameters of
// all routes are there before.
//
// Grid over (batch, block of quads). Shared memory: see PairLayout; words and sums take 24 bytes for a
// token and quad.
#include "common/launch.h"
#include "selective_scan_2d/pair_rows.cuh"
#include "selective_scan_2d/pairs.cuh"
#include "selective_scan_2d/quad_planes.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

using Items = ItemsOf<kQuad>;

// How often the buffer of a block's `number`-th tile was full before.
__device__ __forceinline__ unsigned turn_of_buffer(const PairLayout& at, int number) {
  return unsigned(number) >> at.buffers_log2;
}

// From before a lane's first step to after each of them, of each channel: a state h becomes a h + b.
struct Walked {
  Items a, b;
};

template <class T>
__device__ __forceinline__ void walk(const WordsOf<kQuad>& words, const float (&B)[OfPair::kItems],
                                     const Numbers& A, const Items& delta, Walked& x) {
#pragma unroll
  for (int j = 0; j < OfPair::kItems; ++j) {
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      const float u = half_of_word<T>(words[j].x[c / 2], c % 2), a = decay(delta[c][j], A.x[c]);
      const float b = delta[c][j] * u * B[j];
      x.b[c][j] = j == 0 ? b : a * x.b[c][j - 1] + b;
      x.a[c][j] = j == 0 ? a : a * x.a[c][j - 1];
    }
  }
}

// What the state is before the tile and, of the last one, after it.
__device__ __forceinline__ void store_states(const FwdParams& p, const PairMemory& memory,
                                             const Member& me, const PairTile& tile, float start,
                                             float end) {
  const bool last = tile.i + 1 == int(p.tiles);
  if (p.chunk_states == nullptr && !last) return;
  const Task& task = memory.now().task;
  const int64_t channel = task.channel + me.pair * kQuad + me.lane % kQuad;
  if (me.lane < 32 - kQuad || channel >= p.dim) return;  // the last lanes know the end
  if (p.chunk_states != nullptr) {
    const int64_t row = (task.b * p.routes + tile.route) * p.tiles + tile.i;
    static_cast<float*>(p.chunk_states)[row * p.dim + channel] = start;
  }
  if (!last) return;
  const View<4>& x = p.last_state;
  store_element(x.data, x.dtype, state_offset(x, task.b, tile.route, channel), end);
}

// What the member's tile starts from, of the lane's channel, and what it leaves for the next round.
__device__ __forceinline__ float enter_tile(const FwdParams& p, const PairMemory& memory,
                                            const Member& me, const PairTile& tile,
                                            const ChannelScan<kQuad, false>& scan) {
  const int maps = me.map + tile.turn * memory.at.map_turn, size = kQuad * 8;
  if (scan.is_last()) put_map(memory, me, maps, scan.all);
  me.wait_for_team(memory.at);  // the maps of all are there
  // h in turns: others may still read what the last one leaves for the next round.
  auto* table = memory.get<float>(tile.table) + (kItemStates * kQuad + me.lane % kQuad);
  auto h_at = [&](int turn) -> float& { return table[(kItemH + turn) * kQuad]; };
  float h = h_at(tile.turn);
#pragma unroll
  for (int k = 0; k + 1 < kMaxTeam; ++k) {
    if (k >= me.i) break;
    const auto map = *memory.get<Several<float, 2>>(maps + k * size);
    h = map.x[0] * h + map.x[1];
  }
  const float end = scan.all.a * h + scan.all.b;
  if (tile.last && scan.is_last()) h_at(tile.turn ^ 1) = end;
  store_states(p, memory, me, tile, h, end);
  return h;
}

__device__ __forceinline__ void walk_tile(const FwdParams& p, const PairMemory& memory,
                                          const Member& me, const PairTile& tile,
                                          uint64_t* has_read) {
  auto* table = memory.get<float>(tile.table);
  int at[OfPair::kItems];
  Items delta, slope;
  multiply_ranks<kQuad>(memory, me, tile.rows, memory.get<uint32_t>(tile.weight),
                        FirstSums<kQuad>(table + kItemBias * kQuad), delta);
  load_steps(memory, tile.rows + memory.at.place, me, at);
  find_step_sizes_of_pair<kQuad>(p.delta_softplus, tile.flags, at, delta, slope);
  WordsOf<kQuad> words;
  gather_words<kQuad>(memory, me.words, tile.flags, at, words);
  float B[OfPair::kItems], C[OfPair::kItems];
  load_steps(memory, tile.rows + memory.at.B, me, B);
  load_steps(memory, tile.rows + memory.at.C, me, C);
  __syncwarp();  // all lanes have read the rows
  if (me.lane == 0) ptx::mbarrier_arrive(has_read);
  Walked x;
  with_half_type(p.u.dtype, [&](auto type) {
    walk<decltype(type)>(words, B, several<kQuad>(table[(kItemStates + kItemA) * kQuad]), delta, x);
  });
  Map map[kQuad];
#pragma unroll
  for (int c = 0; c < kQuad; ++c) map[c] = {x.a[c][OfPair::kItems - 1], x.b[c][OfPair::kItems - 1]};
  const ChannelScan<kQuad, false> scan(me.lane, map);
  float h[kQuad];
  scan.enter(enter_tile(p, memory, me, tile, scan), h);
  if (p.weights) {
    const Numbers weight = several<kQuad>(table[kItemWeight * kQuad]);
    add_to_sums<kQuad>(memory, tile.flags, at, me, [&](float sum, int j, int c) {
      return sum + weight.x[c] * C[j] * (x.b[c][j] + x.a[c][j] * h[c]);
    });
  } else {
    add_to_sums<kQuad>(memory, tile.flags, at, me, [&](float sum, int j, int c) {
      return sum + C[j] * (x.b[c][j] + x.a[c][j] * h[c]);
    });
  }
}

__device__ __forceinline__ void walk_routes(const FwdParams& p, const PairMemory& memory) {
  const PairLayout& layout = memory.at;
  const Member me(memory);
  const int tiles = int(p.tiles);
  if (me.pair * kQuad >= memory.now().task.channels) return;
  PairNow& now = memory.now();
#pragma unroll 1
  for (int route = 0; route < int(p.routes); ++route) {
    const int table = ptx::opaque(memory.table(route, me.pair));
    const int weight = ptx::opaque(memory.weight(route, me.pair));
#pragma unroll 1
    for (int round = 0; round < layout.rounds; ++round) {
      const int tile = round * layout.team + me.i;
      if (tile < tiles) {
        const int number = route * tiles + tile, buffer = memory.buffer(number);
        ptx::mbarrier_wait(&now.full[buffer], turn_of_buffer(layout, number) & 1);
        __syncwarp();  // lanes that waited apart go on together: products are of whole warps
        walk_tile(
            p, memory, me,
            {route, tile, memory.flags(number), route * layout.rounds + round & 1,
             me.i + 1 == layout.team || tile + 1 == tiles, memory.rows(number), table, weight},
            &now.free[buffer]);
      } else {
        me.wait_for_team(layout);
        if (round_at(p, now.task.b, route, round).flags & kRepeats) wait_for_turns(layout, me);
      }
    }
  }
}

// Each of the helpers brings tiles of its own.
__device__ __forceinline__ void stage_tiles(const FwdParams& p, const PairMemory& memory) {
  const PairLayout& layout = memory.at;
  PairNow& now = memory.now();
  const int thread = ptx::opaque(int(threadIdx.x)) - 32 * layout.pairs * layout.team;
  const int helper = thread >> 5, lane = thread & 31;
  ask_for_later_block(p, {helper, layout.helpers, lane});
  const int tiles = int(p.tiles), all = tiles * int(p.routes);
  int route = 0, tile = helper, of_rows = -1;
  auto look_up = [&] {
    while (tile >= tiles) tile -= tiles, ++route;
    return tiles_at(p, now.task.b, route, tile, 1);
  };
  Round next{};
  RouteRows rows;
  if (helper < all) next = look_up();
#pragma unroll 1
  for (int number = helper; number < all; number += layout.helpers) {
    Round r = next;
    r.tiles = 1;  // says it to the compiler
    if (r.route != of_rows) rows.begin(p, now.task.b, of_rows = r.route);
    tile += layout.helpers;
    if (number + layout.helpers < all) next = look_up();  // its flags are on their way
    const int buffer = memory.buffer(number);
    stage_round(p, memory, rows, r, number, 1, {0, 1, lane}, [&] {
      ptx::mbarrier_wait(&now.free[buffer], turn_of_buffer(layout, number) + 1 & 1);
    });
    __syncwarp();  // the rows are there
    if (lane == 0) ptx::mbarrier_arrive(&now.full[buffer]);
  }
}

__global__ __launch_bounds__(kPairThreads<false, kQuad>,
                             1) void fwd_quads_kernel(const __grid_constant__ FwdParams p) {
  const PairMemory memory(p);
  const PairLayout& at = p.plan.pair;
  PairNow& now = memory.now();
  const int walkers = 32 * at.pairs * at.team;
  if (threadIdx.x == 0) {
    now.task = task_at(p, blockIdx.x);
    const int quads = (now.task.channels + kQuad - 1) / kQuad;
    for (int i = 0; i < 1 << at.buffers_log2; ++i) {
      ptx::mbarrier_init(&now.full[i], 1);
      ptx::mbarrier_init(&now.free[i], quads);
    }
  }
  __syncthreads();  // the task is known, the mbarriers are there
  const Task& task = now.task;
  if (int(threadIdx.x) >= walkers) {
    stage_tiles(p, memory);
  } else {
    constexpr int kWalkers = 15;  // a barrier that no team has
    if (task.channels < kQuad * at.pairs) {
      // Of what channels there are not nothing is added up.
      clear(memory.get<uint32_t>(memory.words(task.channels / kQuad)), at.pitch * kQuad / 2,
            walkers);
      ptx::barrier_sync(kWalkers, walkers);  // it is zero
    }
    clear(memory.get<uint32_t>(at.sums), at.pairs * at.pitch * kQuad, walkers);
    stage_tables(p, memory, 0, int(p.routes), p.initial_state, ptx::opaque(int(threadIdx.x)),
                 walkers);
    read_quads(p.u, memory, int(p.tokens), walkers);
    ptx::barrier_sync(kWalkers, walkers);  // words, sums and tables are in place
    walk_routes(p, memory);
  }
  __syncthreads();  // all routes have been walked
  write_quads(p, memory);
}

}  // namespace

void fwd_quads(const FwdParams& p, cudaStream_t stream) {
  const PairLayout& at = p.plan.pair;
  launch("selective_scan_2d fwd quads", fwd_quads_kernel, p.plan.grid,
         32 * (at.pairs * at.team + at.helpers), size_t(p.plan.shared_bytes), stream, p);
}

}  // namespace statescan::selective_scan_2d::cuda
