// The selective scan along routes with two channels to a lane, or four ("quads"), for 16-bit maps with
// low-rank delta.
//
//   block:  a batch element and some pairs of channels, along all routes, one after the other
//   team:   the 1 .. 8 warps of a pair; each has a tile of a round of as many neighbouring tiles
//   lane:   8 neighbouring steps of its warp's tile, of all channels of the pair
//
// A token's numbers of u lie side by side, and so do its sums; places, B, C and ranks are loaded once for
// all channels of a lane. What a team does not know before is the state that a tile starts from: each warp
// puts the maps h -> a h + b of its steps together, and the team composes those of its tiles.
//
// Further warps bring what all share, ahead of the others: places, B, C, low-rank delta as an operand of
// tensor cores, and the parameters of routes.
#pragma once

#include "common/mma.cuh"
#include "common/ptx.cuh"
#include "selective_scan_2d/planes.cuh"
#include "selective_scan_2d/walk.cuh"

namespace statescan::selective_scan_2d::cuda {

using OfPair = Config<float, 8, true, true>;
// Numbers of a lane's steps, of each of its channels.
template <int kChannels>
using ItemsOf = float[kChannels][OfPair::kItems];
using PairItems = ItemsOf<2>;

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

inline constexpr int kMaxBuffers = 8;  // of rows

// What a block begins with.
struct PairNow {
  Task task;
  SharedArray<int, kMaxBuffers> flags;  // of what the buffers of rows hold
  // Of quads, where helpers and teams go on by themselves: is a buffer full, has it been read?
  SharedArray<uint64_t, kMaxBuffers> full, free;
};

// A token's numbers side by side are 4 bytes for each channel of sums; lanes are 8 tokens apart along
// rows of a map, 8 rows along columns. Spare tokens keep them in different banks: of pairs 16 lanes along
// rows; of quads 8 lanes along rows, and along columns if the map is a square.
inline void find_spare_tokens(const Problem& p, PairLayout& x) {
  constexpr int kNever = 30;
  x.spare_after[0] = x.channels == 4 ? 3 : 4, x.spare_after[1] = x.channels == 4 ? kNever : 9;
  if (x.channels != 4 || p.tokens == 0 || p.tokens % 4 > 0) return;
  x.spare_after[1] = 3;
  for (int64_t square = p.tokens; square % 4 == 0; square /= 4) ++x.spare_after[1];
}

inline PairLayout pair_layout(const Problem& p, bool backward, int channels, int pairs, int team,
                              int buffers_log2 = 1) {
  PairLayout x{};
  int64_t end = 0;
  auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end += aligned_bytes(bytes);
    return int(begin);
  };
  x.pairs = pairs, x.channels = channels, x.team = team,
  x.helpers = pair_helpers(backward, channels);
  x.rounds = int((p.chunks() + team - 1) / team);
  x.buffer_tiles = channels == 4 ? 1 : team, x.buffers_log2 = buffers_log2;
  x.route_mask = channels == 4 ? -1 : 1;
  find_spare_tokens(p, x);
  x.pitch = (x.position(int(p.tokens)) + 3) / 4 * 4;
  x.rank_blocks = int((p.rank + 7) / 8);
  x.dt_blocks = x.rank_blocks * (p.delta.dtype == DType::kFloat16 ? 2 : 1);
  x.items = int(kItemStates + kStateItems * p.state);
  const int64_t steps = x.buffer_tiles * OfPair::kSteps, tables = channels == 4 ? p.routes : 2;
  take(x.dt_blocks * steps * 16);
  x.B = take(p.state * steps * 4), x.C = take(p.state * steps * 4), x.place = take(steps * 4);
  x.buffer = int(end), end = 0;
  take(sizeof(PairNow));
  x.buffers = take(int64_t(x.buffer) << buffers_log2);
  x.weight = take(tables * pairs * x.rank_blocks * 32 * channels);
  x.table = take(tables * pairs * x.items * 4 * channels);
  x.map = take(2 * pairs * team * 8 * channels), x.map_turn = pairs * team * 8 * channels;
  x.words = take(int64_t(pairs) * x.pitch * 2 * channels);
  x.sums = take(int64_t(pairs) * x.pitch * 4 * channels);
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
  __device__ __forceinline__ int buffer(int round) const {
    return round & (1 << at.buffers_log2) - 1;
  }
  __device__ __forceinline__ int& flags(int round) const { return now().flags[buffer(round)]; }
  // Bytes: where the rows of a round are, and a route's table and weights of a pair.
  __device__ __forceinline__ int rows(int round) const {
    return at.buffers + buffer(round) * at.buffer;
  }
  __device__ __forceinline__ int table(int route, int pair) const {
    return at.table + ((route & at.route_mask) * at.pairs + pair) * at.items * at.channels * 4;
  }
  // Eight each, (two channels, rank block, term, channel), as pairs of 16 bits.
  __device__ __forceinline__ int weight(int route, int pair) const {
    return at.weight +
           ((route & at.route_mask) * at.pairs + pair) * at.rank_blocks * at.channels * 32;
  }
  // Of a pair: all channels of a token.
  __device__ __forceinline__ int words(int pair) const {
    return at.words + pair * at.pitch * at.channels * 2;
  }
  __device__ __forceinline__ int sums(int pair) const {
    return at.sums + pair * at.pitch * at.channels * 4;
  }
};

// Sums of all channels of the block, for read_tokens and write_tokens.
template <int kChannels>
struct PairSums {
  using R = float;
  const PairLayout& layout;
  float* first;

  __device__ __forceinline__ explicit PairSums(const PairMemory& memory)
      : layout(memory.at), first(memory.get<float>(memory.at.sums)) {}
  __device__ __forceinline__ float& at(int c, int token) const {
    return first[(c / kChannels * layout.pitch + layout.position(token)) * kChannels +
                 c % kChannels];
  }
};

// Sets words, a multiple of four, to zero, by the first `threads` threads of the block.
__device__ __forceinline__ void clear(uint32_t* words, int count, int threads) {
  auto* packs = reinterpret_cast<uint4*>(words);
#pragma unroll 1
  for (int i = ptx::opaque(int(threadIdx.x)); i < count / 4; i += threads) packs[i] = {};
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
__device__ __forceinline__ Round tiles_at(const Inputs& p, int64_t b, int route, int first,
                                          int tiles) {
  const int begin = first * OfPair::kSteps, left = int(p.steps) - begin;
  const int tiles_left = int(p.tiles) - first, table = p.place_per_batch ? int(b) : 0;
  const int row = (table * int(p.routes) + route) * int(p.tiles) + first;  // see find_pairs
  return {route,
          tiles_left < tiles ? tiles_left : tiles,
          left < tiles * OfPair::kSteps ? left : tiles * OfPair::kSteps,
          int(__ldg(p.flags + row)),
          begin,
          p.place + int64_t(row) * OfPair::kSteps};
}
__device__ __forceinline__ Round round_at(const Inputs& p, int64_t b, int route, int i) {
  return tiles_at(p, b, route, i * p.plan.pair.team, p.plan.pair.team);
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
    map = ptx::opaque(at.map + (pair * at.team * at.channels + lane % at.channels) * 8);
    // Of the first step and depth; those of others differ from it in bits of their own.
    const int matrix = lane / 8, step = lane % 8 * 32 + matrix / 2 * 8 + matrix % 2;
    const int first = at.buffer_tiles > 1 ? i * OfPair::kSteps : 0;
    dt = ptx::opaque((first + dt_unit(step)) * 16);
    row = ptx::opaque(first * 4 + lane * 16);
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

// The 16-bit numbers of all channels at a lane's steps, as they lie there; 0 at steps of no token.
template <int kChannels>
using WordsOf = Several<uint32_t, kChannels / 2>[OfPair::kItems];
template <int kChannels>
__device__ __forceinline__ void gather_words(const PairMemory& memory, int words, int flags,
                                             const int (&at)[OfPair::kItems],
                                             WordsOf<kChannels>& x) {
  const auto* plane = memory.get<Several<uint32_t, kChannels / 2>>(words);
  if (flags & kHoles) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
      x[j] = {};
      if (at[j] >= 0) x[j] = plane[at[j]];
    }
  } else {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) x[j] = plane[at[j]];
  }
}
// One of the two numbers of a word.
template <class T>
__device__ __forceinline__ float half_of_word(uint32_t word, int i) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bits_to_float(i == 0 ? word << 16 : word & 0xffff0000);
  } else {
    return to_number(T{uint16_t(word >> 16 * i)});
  }
}
// Calls f(tag of the type) of 16-bit elements.
template <class F>
__device__ __forceinline__ void with_half_type(DType dtype, F&& f) {
  dtype == DType::kBFloat16 ? f(BFloat16{}) : f(Half{});
}
__device__ __forceinline__ void gather_numbers(const PairMemory& memory, int words, int flags,
                                               DType dtype, const int (&at)[OfPair::kItems],
                                               PairItems& x) {
  WordsOf<2> word;
  gather_words<2>(memory, words, flags, at, word);
  with_half_type(dtype, [&](auto type) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) x[c][j] = half_of_word<decltype(type)>(word[j].x[0], c);
    }
  });
}

// The turns of add_to_sums of a member that adds nothing.
__device__ __forceinline__ void wait_for_turns(const PairLayout& at, const Member& me) {
#pragma unroll 1
  for (int member = 0; member < at.team; ++member) me.wait_for_team(at);
}

// sums = term(sum, step, channel). Where a token comes twice in a round warps and lanes take turns, in the
// order of the route.
template <int kChannels, class F>
__device__ __forceinline__ void add_to_sums(const PairMemory& memory, int flags,
                                            const int (&at)[OfPair::kItems], const Member& me,
                                            F&& term) {
  using Sum = Several<float, kChannels>;
  auto* sums = memory.get<Sum>(me.sums);
  auto add = [&](int j, Sum sum) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sum.x[c] = term(sum.x[c], j, c);
    sums[at[j]] = sum;
  };
  auto add_where_token = [&] {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) {
      if (at[j] >= 0) add(j, sums[at[j]]);
    }
  };
  if (flags & kRepeats) {
#pragma unroll 1
    for (int member = 0; member < memory.at.team; ++member) {
#pragma unroll 1
      for (int lane = 0; lane < 32 && member == me.i; ++lane) {
        if (lane == me.lane) add_where_token();
        __syncwarp();  // what the lane added is there
      }
      me.wait_for_team(memory.at);  // what the member added is there
    }
  } else if (flags & kHoles) {
    add_where_token();
  } else {
    constexpr int kSome = 8 / kChannels;  // on their way at once
#pragma unroll
    for (int i = 0; i < OfPair::kItems; i += kSome) {
      Sum sum[kSome];
#pragma unroll
      for (int j = 0; j < kSome; ++j) sum[j] = sums[at[i + j]];
#pragma unroll
      for (int j = 0; j < kSome; ++j) add(i + j, sum[j]);
    }
  }
}

// The sums that the product below begins with, of two channels at a time: bias, of a step and the next one.
template <int kChannels>
struct FirstSums {
  float sum[kChannels / 2][4];

  __device__ __forceinline__ explicit FirstSums(const float* bias) {
    const uint32_t none[4] = {};
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) {
      const float b0 = bias[2 * i], b1 = bias[2 * i + 1], twice[4] = {b0, b1, b0, b1};
      // From a product, so that they lie in registers as products take them, without copies for each.
      ptx::mma_16x8x16_bf16(sum[i], none, {none[0], none[1]}, twice);
    }
  }
};

// delta of all channels before softplus, bias included. The steps of a lane fall to it by themselves:
//
//   rows:    lanes' groups g = 0 .. 7, of a step and of the next one
//   depth:   (m, rank): for each of four lanes m of a group the eight ranks at its own steps
//   columns: (m, channel), with the weights of the channel at that m and zeros at the other three
//
// Two channels at a time, with the same rows.
template <int kChannels>
__device__ __forceinline__ void multiply_ranks(const PairMemory& memory, const Member& me, int rows,
                                               const uint32_t* weight,
                                               const FirstSums<kChannels>& first,
                                               ItemsOf<kChannels>& x) {
  constexpr int kTwos = kChannels / 2, kPairsOfSteps = OfPair::kItems / 2;
  const PairLayout& at = memory.at;
  float sum[kTwos][kPairsOfSteps][4];
  const int mine = me.lane / 8;
  weight += me.lane / 4 % 2 * 4 + me.lane % 4;
  rows += me.dt;
  auto multiply = [&](int k, bool begins) {
    uint32_t w[kTwos][2];
#pragma unroll
    for (int i = 0; i < kTwos; ++i) {
      const uint32_t* of_two = weight + (i * at.rank_blocks + k) * 16;
      w[i][0] = of_two[0], w[i][1] = of_two[8];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[kTwos][2][2];
#pragma unroll
      for (int i = 0; i < 4 * kTwos; ++i) {
        b[i / 4][i / 2 % 2][i % 2] = mine == 2 * half + i % 2 ? w[i / 4][i / 2 % 2] : 0;
      }
#pragma unroll
      for (int q = 0; q < kPairsOfSteps; ++q) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, memory.get<char>((rows ^ (2 * q ^ 4 * half) * 16) + 256 * half));
#pragma unroll
        for (int i = 0; i < kTwos; ++i) {
          begins&& half == 0 ? ptx::mma_16x8x16_bf16(sum[i][q], a, b[i][0], first.sum[i])
                             : ptx::mma_16x8x16_bf16(sum[i][q], a, b[i][0]);
          ptx::mma_16x8x16_bf16(sum[i][q], a, b[i][1]);
        }
      }
    }
  };
  multiply(0, true);
#pragma unroll 1
  for (int block = 1, k = 1; block < at.dt_blocks; ++block, ++k) {
    if (k == at.rank_blocks) k = 0;  // the second terms
    rows += at.buffer_tiles * OfPair::kSteps * 16;
    multiply(k, false);
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
#pragma unroll
    for (int j = 0; j < OfPair::kItems; ++j) x[c][j] = sum[c / 2][j / 2][j % 2 * 2 + c % 2];
  }
}

// The step sizes of a lane, see stage_tables for their unit, and their slopes; 0 at steps to skip.
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

// Bytes: where the maps of a team's tiles are; a turn is over for all when the next one's are there.
__device__ __forceinline__ int maps_of_turn(const PairMemory& memory, const Member& me, int turn) {
  return me.map + (turn & 1) * memory.at.map_turn;
}
// The member's, of the lane's channel.
__device__ __forceinline__ void put_map(const PairMemory& memory, const Member& me, int maps,
                                        const Map& map) {
  *memory.get<Several<float, 2>>(maps + me.i * memory.at.channels * 8) = {{map.a, map.b}};
}

// Composes the maps of a team's tiles, kBack: from the last to the first. Returns what the member's own
// starts from, of the lane's channel; `h` becomes what comes after all of them.
template <bool kBack>
__device__ __forceinline__ float start_of_tile(const PairMemory& memory, const Member& me, int maps,
                                               float& h) {
  const int team = memory.at.team, size = memory.at.channels * 8;
  me.wait_for_team(memory.at);  // the maps of all are there
  float start = h;
  if (kBack) maps += (team - 1) * size;
#pragma unroll 1
  for (int k = 0; k < team; ++k, maps += kBack ? -size : size) {
    const auto map = *memory.get<Several<float, 2>>(maps);
    if (k == (kBack ? team - 1 - me.i : me.i)) start = h;
    h = map.x[0] * h + map.x[1];
  }
  return start;
}

// Past the end of the route: the identity, and what a team waits for.
__device__ __forceinline__ void walk_no_tile(const PairMemory& memory, const Member& me, int states,
                                             int flags) {
#pragma unroll 1
  for (int n = 0; n < states; ++n) {
    const int maps = maps_of_turn(memory, me, n);
    if (me.lane < memory.at.channels) put_map(memory, me, maps, {});
    me.wait_for_team(memory.at);  // the maps of all are there
  }
  if (flags & kRepeats) wait_for_turns(memory.at, me);
}

// Puts together the maps of the lanes' steps of all channels, kBack: from the last lane to the first.
// Neighbouring lanes deal the channels out among them, so that each has one channel of all of them: of two
// channels one scan over 16 pairs of lanes does for two over 32; of four one over 8 for four.
template <int kChannels, bool kBack>
struct ChannelScan {
  int lane;
  Map before[kChannels - 1];  // of those that come first, of 1, 2, .. channels: see enter()
  Map all;                    // of all lanes until these, of channel lane % kChannels

  __device__ __forceinline__ ChannelScan(int lane, const Map (&maps)[kChannels]) : lane(lane) {
    Map map[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) map[c] = maps[c];
    // Lanes that differ in a bit keep the channels whose number has it as theirs has.
#pragma unroll
    for (int left = kChannels / 2, bit = 1; left > 0; left /= 2, bit *= 2) {
      const bool odd = lane & bit;
#pragma unroll
      for (int k = 0; k < left; ++k) {
        const Map mine = choose(odd, map[2 * k + 1], map[2 * k]);
        const Map other = choose(odd, map[2 * k], map[2 * k + 1]);
        const Map theirs =
            from_lane(other, [&](float x) { return __shfl_xor_sync(kAllLanes, x, bit); });
        before[left - 1 + k] = choose(odd == kBack, mine, theirs);
        map[k] = then(before[left - 1 + k], choose(odd == kBack, theirs, mine));
      }
    }
    all = map[0];
#pragma unroll
    for (int lanes = kChannels; lanes < 32; lanes *= 2) {
      const Map x = from_lane(all, [&](float x) { return from(x, lanes); });
      if (passed() >= lanes) all = then(x, all);
    }
  }
  __device__ __forceinline__ static float from(float x, int lanes) {
    return kBack ? __shfl_down_sync(kAllLanes, x, lanes) : __shfl_up_sync(kAllLanes, x, lanes);
  }
  __device__ __forceinline__ int passed() const { return kBack ? 31 - lane : lane; }
  // Does the lane have, in `all`, the map of all lanes for its channel?
  __device__ __forceinline__ bool is_last() const { return passed() >= 32 - kChannels; }

  // What the lane's steps start from, if those of all lanes start from `start`, of the lane's channel.
  __device__ __forceinline__ void enter(float start, float (&h)[kChannels]) const {
    h[0] = from(all.a * start + all.b, kChannels);
    if (passed() < kChannels) h[0] = start;
#pragma unroll
    for (int left = 1, bit = kChannels / 2; bit > 0; left *= 2, bit /= 2) {
      const bool odd = lane & bit, first = odd == kBack;
#pragma unroll
      for (int k = left - 1; k >= 0; --k) {
        const Map& map = before[left - 1 + k];
        const float middle = map.a * h[k] + map.b;
        const float theirs = __shfl_xor_sync(kAllLanes, first ? middle : h[k], bit);
        const float mine = first ? h[k] : middle;
        h[2 * k] = odd ? theirs : mine, h[2 * k + 1] = odd ? mine : theirs;
      }
    }
  }
};

}  // namespace statescan::selective_scan_2d::cuda
