// The selective scan along routes with two channels to a lane, for 16-bit maps with low-rank delta.
//
//   block:  a batch element and some pairs of channels, along all routes, one after the other
//   team:   the 1, 2 or 4 warps of a pair; each has a tile of a round of as many neighbouring tiles
//   lane:   8 neighbouring steps of its warp's tile, of both channels
//
// Both channels of a token share a word of u and lie side by side as sums; places, B and C are loaded once
// for both. What a team does not know before is the state that a tile starts from: each warp puts the
// maps h -> a h + b of its steps together, and the team composes those of its tiles.
//
// Further warps bring what all share, a round ahead of the others: places, B, C, and low-rank delta as
// an operand of tensor cores. At a route's first round they bring its parameters, too.
#pragma once

#include "common/mma.cuh"
#include "common/ptx.cuh"
#include "selective_scan_2d/planes.cuh"
#include "selective_scan_2d/walk.cuh"

namespace statescan::selective_scan_2d::cuda {

using OfPair = Config<float, 8, true, true>;
using PairItems = float[2][OfPair::kItems];  // of each channel

// Where a token is in a plane of pairs: such that 16 lanes 8 tokens apart meet in no bank with 64 bits.
STATESCAN_HOST_DEVICE constexpr int in_pair_plane(int token) {
  return token + (token >> 4) + (token >> 9);
}

// A pair's table for a route, (item, channel): parameters, and of each state A and twice h, of the
// rounds in turn.
enum Item { kItemD, kItemWeight, kItemBias, kItemStates = 4 };
enum StateItem { kItemA, kItemH, kStateItems = 3 };

// The backward's ddelta for tensor cores: groups of 8 channels, of each 16 rows (term, channel) of steps.
inline constexpr int kPairsOfGroup = 4;
STATESCAN_HOST_DEVICE constexpr int ddelta_pitch(int steps) { return steps + kTilePad; }
// What a member of a team sums up along a route, of each channel.
enum TeamSum { kSumA, kSumD, kSumBias, kTeamSums = 8 };

STATESCAN_HOST_DEVICE int64_t aligned_bytes(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// What a block begins with.
struct PairNow {
  Task task;
  SharedArray<int, 2> flags;  // of the rounds in the two buffers
};

inline PairLayout pair_layout(const Problem& p, bool backward, int pairs, int team_log2) {
  PairLayout x{};
  int64_t end = 0;
  auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end += aligned_bytes(bytes);
    return int(begin);
  };
  const int64_t team = int64_t(1) << team_log2, steps = team * OfPair::kSteps;
  x.pairs = pairs, x.team = int(team), x.team_log2 = team_log2, x.helpers = pair_helpers(backward);
  x.pitch = (in_pair_plane(int(p.tokens)) + 3) / 4 * 4;
  x.rank_blocks = int((p.rank + 7) / 8);
  x.dt_blocks = x.rank_blocks * (p.delta.dtype == DType::kFloat16 ? 2 : 1);
  x.items = int(kItemStates + kStateItems * p.state);
  take(x.dt_blocks * steps * 16);
  x.B = take(p.state * steps * 4), x.C = take(p.state * steps * 4), x.place = take(steps * 4);
  x.buffer = int(end), end = 0;
  take(sizeof(PairNow));
  x.buffers = take(2 * int64_t(x.buffer));
  x.weight = take(int64_t(2) * pairs * x.rank_blocks * 64);
  x.table = take(int64_t(2) * pairs * x.items * 8);
  x.map = take(2 * pairs * team * 16);
  x.words = take(int64_t(pairs) * x.pitch * 4), x.sums = take(int64_t(pairs) * x.pitch * 8);
  if (backward) {
    const int groups = (pairs + kPairsOfGroup - 1) / kPairsOfGroup;
    x.dy = take(int64_t(pairs) * x.pitch * 4);
    x.shares = take(2 * pairs * steps * 4);
    x.ddelta = take(groups * 16 * ddelta_pitch(int(steps)) * 2);
    x.team_sums = take(2 * pairs * team * kTeamSums * 4);
    x.helper_sums = take(int64_t(x.helpers) * groups * x.rank_blocks * 128 * 4);
  }
  x.bytes = end;
  return x;
}

struct PairMemory {
  const PairLayout& at;
  char* first;

  __device__ __forceinline__ explicit PairMemory(const Inputs& p)
      : at(p.plan.pair), first(dynamic_shared<char>()) {}
  template <class T>
  __device__ __forceinline__ T* get(int64_t bytes) const {
    return reinterpret_cast<T*>(first + bytes);
  }
  __device__ __forceinline__ PairNow& now() const { return *get<PairNow>(0); }
  // Bytes: where the rows of a round are, and a route's table and weights of a pair.
  __device__ __forceinline__ int rows(int round) const {
    return at.buffers + (round & 1) * at.buffer;
  }
  __device__ __forceinline__ int table(int route, int pair) const {
    return at.table + ((route & 1) * at.pairs + pair) * at.items * 8;
  }
  // Eight each, (rank block, term, channel), as pairs of 16 bits.
  __device__ __forceinline__ int weight(int route, int pair) const {
    return at.weight + ((route & 1) * at.pairs + pair) * at.rank_blocks * 64;
  }
  // Of a pair: both channels of a token.
  __device__ __forceinline__ int words(int pair) const { return at.words + pair * at.pitch * 4; }
  __device__ __forceinline__ int sums(int pair) const { return at.sums + pair * at.pitch * 8; }
};

// Sums of all channels of the block, for read_tokens and write_tokens.
struct PairSums {
  using R = float;
  float* first;
  int pitch;
  __device__ __forceinline__ float& at(int c, int token) const {
    return first[(c / 2 * pitch + in_pair_plane(token)) * 2 + c % 2];
  }
};

// Sets words, a multiple of four, to zero, by all threads of the block.
__device__ __forceinline__ void clear(uint32_t* words, int count) {
  auto* packs = reinterpret_cast<uint4*>(words);
#pragma unroll 1
  for (int i = ptx::opaque(int(threadIdx.x)); i < count / 4; i += int(blockDim.x)) packs[i] = {};
}

// Eight numbers in 16 bits each, and in `second`, if there is one, what that leaves.
__device__ __forceinline__ void store_terms(const float (&x)[8], uint4* first, uint4* second) {
  uint32_t term[4], rest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    term[i] = ptx::pack_bf16(x[2 * i], x[2 * i + 1]);
    rest[i] = ptx::pack_bf16(x[2 * i] - bits_to_float(term[i] << 16),
                             x[2 * i + 1] - bits_to_float(term[i] & 0xffff0000));
  }
  *first = {term[0], term[1], term[2], term[3]};
  if (second != nullptr) *second = {rest[0], rest[1], rest[2], rest[3]};
}

// A round of a route: as many neighbouring tiles as a team has warps, or fewer at the end.
struct Round {
  int route, tiles, steps;
  int flags;  // of all of the tiles
  int64_t begin;
  const int32_t* place;
};
__device__ __forceinline__ Round round_at(const Inputs& p, int64_t b, int route, int i) {
  const int team = p.plan.pair.team, first = i * team;
  const int64_t begin = int64_t(first) * OfPair::kSteps, left = p.steps - begin;
  const int64_t row = ((p.place_per_batch ? b : 0) * p.routes + route) * p.tiles + first;
  return {route,
          p.tiles - first < team ? int(p.tiles) - first : team,
          left < team * OfPair::kSteps ? int(left) : team * OfPair::kSteps,
          int(__ldg(p.flags + row)),
          begin,
          p.place + row * OfPair::kSteps};
}
__device__ __forceinline__ int rounds_of(const Inputs& p) {
  return int((p.tiles + p.plan.pair.team - 1) >> p.plan.pair.team_log2);
}

// Where the eight ranks of step t are: both the rows that a load of four matrices brings (32 steps
// apart) and those that neighbouring threads store (8 steps apart) lie in different banks.
__device__ __forceinline__ int dt_unit(int t) { return t ^ ((t >> 5 ^ (t >> 3 & 3) * 2) & 7); }

// A warp of a pair's team. What it reads where is kept, in bytes, so that little of it is found out again
// for every round.
struct Member {
  int pair, i, lane;
  int words, sums;  // of the pair
  int map;          // the lane's channel of the first member's map
  int dt, row;      // the lane's in the rows of a round

  __device__ __forceinline__ explicit Member(const PairMemory& memory) {
    const PairLayout& at = memory.at;
    // From lane 0, which tells the compiler that it is the same in all lanes.
    const int thread = ptx::opaque(int(threadIdx.x));
    const int warp = __shfl_sync(kAllLanes, thread / 32, 0);
    // Those that have the last tile of a route to themselves are warps of different schedulers.
    pair = warp % at.pairs, i = warp / at.pairs, lane = thread % 32;
    words = ptx::opaque(memory.words(pair)), sums = ptx::opaque(memory.sums(pair));
    map = ptx::opaque(at.map + pair * at.team * 16 + lane % 2 * 8);
    // Of the first step and depth; those of others differ from it in bits of their own.
    const int matrix = lane / 8, step = lane % 8 * 32 + matrix / 2 * 8 + matrix % 2;
    dt = ptx::opaque((i * OfPair::kSteps + dt_unit(step)) * 16);
    row = ptx::opaque(i * OfPair::kSteps * 4 + lane * 16);
  }
  __device__ __forceinline__ void wait_for_team(const PairLayout& at) const {
    at.team == 1 ? __syncwarp() : ptx::barrier_sync(1 + pair, at.team * 32);
  }
};

// The lane's steps of a row, where that of the first lane is at `row`.
template <class E>
__device__ __forceinline__ void load_steps(const PairMemory& memory, int row, const Member& me,
                                           E (&x)[OfPair::kItems]) {
  load_items<OfPair>(memory.get<E>(row + me.row), 0, x);
}

// Both channels' numbers of words; 0 at steps of no token.
__device__ __forceinline__ void gather_words(const uint32_t* plane, int flags, DType dtype,
                                             const int (&at)[OfPair::kItems], PairItems& x) {
  uint32_t word[OfPair::kItems];
  if (flags & kHoles) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) word[j] = at[j] >= 0 ? plane[at[j]] : 0;
  } else {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) word[j] = plane[at[j]];
  }
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
      x[0][j] = bits_to_float(word[j] << 16), x[1][j] = bits_to_float(word[j] & 0xffff0000);
    }
  } else {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
      x[0][j] = to_number(Half{uint16_t(word[j])});
      x[1][j] = to_number(Half{uint16_t(word[j] >> 16)});
    }
  }
}

// The turns of add_to_sums of a member that adds nothing.
__device__ __forceinline__ void wait_for_turns(const PairLayout& at, const Member& me) {
#pragma unroll 1
  for (int member = 0; member < at.team; ++member) me.wait_for_team(at);
}

// sums += scale x. Where a token comes twice in a round warps and lanes take turns, in the order of the
// route.
__device__ __forceinline__ void add_to_sums(Several<float, 2>* sums, int flags,
                                            const int (&at)[OfPair::kItems],
                                            const PairLayout& layout, const Member& me,
                                            const float (&scale)[2], const PairItems& x) {
  auto add = [&](int j, const Several<float, 2>& sum) {
    sums[at[j]] = {{sum.x[0] + scale[0] * x[0][j], sum.x[1] + scale[1] * x[1][j]}};
  };
  auto add_where_token = [&] {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
      if (at[j] >= 0) add(j, sums[at[j]]);
    }
  };
  if (flags & kRepeats) {
#pragma unroll 1
    for (int member = 0; member < layout.team; ++member) {
#pragma unroll 1
      for (int lane = 0; lane < 32 && member == me.i; ++lane) {
        if (lane == me.lane) add_where_token();
        __syncwarp();  // what the lane added is there
      }
      me.wait_for_team(layout);  // what the member added is there
    }
  } else if (flags & kHoles) {
    add_where_token();
  } else {
    constexpr int kSome = 4;  // on their way at once
#pragma unroll
    for (int i = 0; i < OfPair::kItems; i += kSome) {
      Several<float, 2> sum[kSome];
#pragma unroll
      for (int j = 0; j < kSome; ++j) sum[j] = sums[at[i + j]];
#pragma unroll
      for (int j = 0; j < kSome; ++j) add(i + j, sum[j]);
    }
  }
}

// delta of both channels before softplus, bias included. The steps of a lane fall to it by themselves:
//
//   rows:    lanes' groups g = 0 .. 7, of a step and of the next one
//   depth:   (m, rank): for each of four lanes m of a group the eight ranks at its own steps
//   columns: (m, channel), with the weights of the channel at that m and zeros at the other three
__device__ __forceinline__ void multiply_ranks(const PairMemory& memory, const Member& me, int rows,
                                               const uint32_t* weight, const float (&bias)[2],
                                               PairItems& x) {
  const PairLayout& at = memory.at;
  float sum[OfPair::kItems / 2][4];
#pragma unroll
  for (int q = 0; q < OfPair::kItems / 2; ++q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[q][i] = bias[i % 2];
  }
  const int column = me.lane / 4, mine = column / 2;
  weight += column % 2 * 4 + me.lane % 4;
  rows += me.dt;
  auto multiply = [&](int k) {
    const uint32_t w[2] = {weight[k * 16], weight[k * 16 + 8]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = mine == 2 * half + i % 2 ? w[i / 2] : 0;
#pragma unroll
      for (int q = 0; q < OfPair::kItems / 2; ++q) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, memory.get<char>((rows ^ (2 * q ^ 4 * half) * 16) + 256 * half));
        ptx::mma_16x8x16_bf16(sum[q], a, b[0]);
        ptx::mma_16x8x16_bf16(sum[q], a, b[1]);
      }
    }
  };
  multiply(0);
#pragma unroll 1
  for (int block = 1, k = 1; block < at.dt_blocks; ++block, ++k) {
    if (k == at.rank_blocks) k = 0;  // the second terms
    rows += OfPair::kSteps * 16 << at.team_log2;
    multiply(k);
  }
#pragma unroll
  for (int j = 0; j < OfPair::kItems; ++j) {
    x[0][j] = sum[j / 2][j % 2 * 2], x[1][j] = sum[j / 2][j % 2 * 2 + 1];
  }
}

// The step sizes of a lane, see stage_table for their unit, and their slopes; 0 at steps to skip.
__device__ __forceinline__ void find_pair_step_sizes(bool delta_softplus, int flags,
                                                     const int (&at)[OfPair::kItems],
                                                     PairItems& delta, PairItems& slope) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) slope[c][j] = 1;
    if (delta_softplus) {
#pragma unroll
      for (int j = 0; j < OfPair::kItems; ++j) {
        delta[c][j] = softplus_base2(delta[c][j], slope[c][j]);
      }
    }
    if (flags & kHoles) {
#pragma unroll
      for (int j = 0; j < OfPair::kItems; ++j) {
        if (at[j] == kSkip) delta[c][j] = slope[c][j] = 0;
      }
    }
  }
}

// A map h -> a h + b.
struct Map {
  float a = 1, b = 0;
};
__device__ __forceinline__ Map then(const Map& first, const Map& second) {
  return {second.a * first.a, second.a * first.b + second.b};
}
__device__ __forceinline__ Map choose(bool which, const Map& x, const Map& y) {
  return {which ? x.a : y.a, which ? x.b : y.b};
}
template <class F>
__device__ __forceinline__ Map from_lane(const Map& x, F&& shuffle) {
  return {shuffle(x.a), shuffle(x.b)};
}

// A warp's tile.
struct PairTile {
  int route, i, flags;
  int turn;                 // of the two that rounds of a route take
  bool last;                // round of its route
  int rows, table, weight;  // bytes: where they are
};

// Composes the maps of a team's tiles, kBack: from the last to the first. Returns what the member's own
// starts from, of the lane's channel; `h` becomes what comes after all of them.
template <bool kBack>
__device__ __forceinline__ float start_of_tile(const PairMemory& memory, const Member& me, int maps,
                                               float& h) {
  me.wait_for_team(memory.at);  // the maps of all are there
  float start = h;
#pragma unroll
  for (int k = 0; k < kMaxTeam; ++k) {
    if (k >= memory.at.team) break;
    const int i = kBack ? memory.at.team - 1 - k : k;
    const auto map = *memory.get<Several<float, 2>>(maps + i * 16);
    if (i == me.i) start = h;
    h = map.x[0] * h + map.x[1];
  }
  return start;
}

// Past the end of the route: the identity, and what a team waits for.
__device__ __forceinline__ void walk_no_tile(const PairMemory& memory, const Member& me, int states,
                                             int flags) {
#pragma unroll 1
  for (int n = 0; n < states; ++n) {
    const int maps = me.map + (n & 1) * memory.at.pairs * memory.at.team * 16;
    if (me.lane < 2) *memory.get<Several<float, 2>>(maps + me.i * 16) = {{1, 0}};
    me.wait_for_team(memory.at);  // the maps of all are there
  }
  if (flags & kRepeats) wait_for_turns(memory.at, me);
}

// Puts together the maps of the lanes' steps of both channels, kBack: from the last lane to the first.
// Neighbouring lanes exchange a channel, so that an even lane has the first channel of both, an odd
// lane the second: one scan over 16 pairs of lanes does for two over 32.
template <bool kBack>
struct PairScan {
  int lane;
  bool odd, first;  // first: of the two lanes, on the way
  Map before, all;  // of the first of the two lanes; of all until these two

  __device__ __forceinline__ PairScan(int lane, const Map (&map)[2])
      : lane(lane), odd(lane & 1), first(odd == kBack) {
    const Map mine = choose(odd, map[1], map[0]), other = choose(odd, map[0], map[1]);
    const Map theirs = from_lane(other, [](float x) { return __shfl_xor_sync(kAllLanes, x, 1); });
    before = choose(first, mine, theirs);
    all = then(before, choose(first, theirs, mine));
#pragma unroll
    for (int lanes = 2; lanes < 32; lanes *= 2) {
      const Map x = from_lane(all, [&](float x) { return from(x, lanes); });
      if (passed() >= lanes) all = then(x, all);
    }
  }
  __device__ __forceinline__ static float from(float x, int lanes) {
    return kBack ? __shfl_down_sync(kAllLanes, x, lanes) : __shfl_up_sync(kAllLanes, x, lanes);
  }
  __device__ __forceinline__ int passed() const { return kBack ? 31 - lane : lane; }
  // Does the lane have, in `all`, the map of all lanes for its channel?
  __device__ __forceinline__ bool is_last() const { return passed() >= 30; }

  // What the lane's steps start from, if those of all lanes start from `start`, of the lane's channel.
  __device__ __forceinline__ void enter(float start, float (&h)[2]) const {
    float in = from(all.a * start + all.b, 2);
    if (passed() < 2) in = start;
    const float middle = before.a * in + before.b;
    const float theirs = __shfl_xor_sync(kAllLanes, first ? middle : in, 1);
    const float mine = first ? in : middle;
    h[0] = odd ? theirs : mine, h[1] = odd ? mine : theirs;
  }
};

}  // namespace statescan::selective_scan_2d::cuda
