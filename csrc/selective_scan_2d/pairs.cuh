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

#include "selective_scan_2d/pair_memory.cuh"
#include "selective_scan_2d/pair_scan.cuh"
#include "selective_scan_2d/walk.cuh"

namespace statescan::selective_scan_2d::cuda {

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
template <int kChannels>
__device__ __forceinline__ void find_step_sizes_of_pair(bool delta_softplus, int flags,
                                                        const int (&at)[OfPair::kItems],
                                                        ItemsOf<kChannels>& delta,
                                                        ItemsOf<kChannels>& slope) {
  auto for_steps = [&](auto&& f) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int j = 0; j < OfPair::kItems; ++j) f(j, delta[c][j], slope[c][j]);
    }
  };
  for_steps([](int, float&, float& slope) { slope = 1; });
  if (delta_softplus) {
    for_steps([](int, float& delta, float& slope) { delta = softplus_base2(delta, slope); });
  }
  if (flags & kHoles) {
    for_steps([&](int j, float& delta, float& slope) {
      if (at[j] == kSkip) delta = slope = 0;
    });
  }
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

}  // namespace statescan::selective_scan_2d::cuda
