// Where things are that a block with pairs of channels has in shared memory, see pairs.cuh for who does
// what with them.
#pragma once

#include "common/mma.cuh"
#include "common/ptx.cuh"
#include "selective_scan_2d/tile.cuh"

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

}  // namespace statescan::selective_scan_2d::cuda
