// Backward with pairs of channels, between two rounds: what the channels of a block add up.
#pragma once

#include "common/device_view.cuh"
#include "common/mma.cuh"
#include "selective_scan_2d/pairs.cuh"

namespace statescan::selective_scan_2d::cuda {

__device__ __forceinline__ BFloat16* ddelta_of(const PairMemory& memory, int group) {
  const int steps = OfPair::kSteps * memory.at.team;
  return memory.get<BFloat16>(memory.at.ddelta) + group * 16 * ddelta_pitch(steps);
}

// A pair's share of dB (0) or dC (1), along a round.
__device__ __forceinline__ int share_of_pair(const PairMemory& memory, int which, int pair) {
  const PairLayout& at = memory.at;
  return at.shares + (which * at.pairs + pair) * at.team * OfPair::kSteps * 4;
}

// dB and dC, summed over the pairs, four steps at a time.
__device__ __forceinline__ void write_shares(const BwdParams& p, const PairMemory& memory,
                                             const Round& r) {
  const PairLayout& at = memory.at;
  const Task& task = memory.now().task;
  const int packs = at.team * OfPair::kSteps / 4, there = (task.channels + 1) / 2;
  const int64_t row = ((task.block * p.routes + r.route) * p.batch + task.b) * p.steps + r.begin;
#pragma unroll 1
  for (int i = ptx::opaque(int(threadIdx.x)); i < 2 * packs; i += at.pairs * at.team * 32) {
    const int which = i >= packs, t = (i - which * packs) * 4;
    if (t >= r.steps) continue;
    int from = share_of_pair(memory, which, 0) + in_round_row(t) * 4;
    Several<float, 4> sum = *memory.get<Several<float, 4>>(from);
#pragma unroll 1
    for (int pair = 1; pair < there; ++pair) {
      from += at.team * OfPair::kSteps * 4;
      const auto share = *memory.get<Several<float, 4>>(from);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.x[j] += share.x[j];
    }
    float* to = static_cast<float*>(which == 0 ? p.dB : p.dC) + row + t;
    if (p.steps % 4 == 0) {
      Pack<float, 4>::of(sum.x).store(to);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (t + j < r.steps) to[j] = sum.x[j];
      }
    }
  }
}

// ddt, 8 ranks by 16 steps at a time: dt_weight^T (rank, (term, channel)) times ddelta, and once more for
// the second terms of the weights.
__device__ __forceinline__ void write_ddt(const BwdParams& p, const PairMemory& memory,
                                          const Round& r, float unit) {
  const PairLayout& at = memory.at;
  const Task& task = memory.now().task;
  const int steps = OfPair::kSteps * at.team, pitch = ddelta_pitch(steps);
  const int groups = (at.pairs + kPairsOfGroup - 1) / kPairsOfGroup;
  const int thread = ptx::opaque(int(threadIdx.x)), lane = thread % 32;
  const int of_rank = lane / 4, of_pair = lane % 4, stride = at.pairs * at.team * 16;
  auto load_weights = [&](int group, int block, uint32_t (&first)[4], uint32_t (&second)[4]) {
    const int pair = group * kPairsOfGroup + of_pair;  // where none is, ddelta is zero
    const auto* w = memory.get<BFloat16>(memory.weight(r.route, pair < at.pairs ? pair : 0)) +
                    block * 32 + of_rank;
    first[0] = first[2] = w[0].bits | uint32_t(w[8].bits) << 16;
    second[0] = w[16].bits | uint32_t(w[24].bits) << 16;
    first[1] = first[3] = second[1] = second[2] = second[3] = 0;
  };
  // The lane's row of right_of.
  const BFloat16* depth = ddelta_of(memory, 0) + lane % 16 * pitch + lane / 16 * 8;
  const int64_t row = (task.block * p.routes + r.route) * p.batch + task.b;
  float* to =
      static_cast<float*>(p.ddt) + (row * p.rank + of_rank) * p.steps + r.begin + of_pair * 2;
#pragma unroll 1
  for (int block = 0; block < at.rank_blocks; ++block, to += 8 * p.steps) {
    const bool there = block * 8 + of_rank < p.rank;
    uint32_t first[4], second[4];
    load_weights(0, block, first, second);
#pragma unroll 1
    for (int begin = thread / 32 * 16; begin < r.steps; begin += stride) {
      __syncwarp();  // lanes part where they store: products are of whole warps
      float sum[2][4] = {};
      auto multiply = [&](int group) {
        uint32_t ddelta[4];
        ptx::ldmatrix_x4_trans(ddelta, depth + group * 16 * pitch + begin);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t columns[2] = {ddelta[2 * half], ddelta[2 * half + 1]};
          ptx::mma_16x8x16_bf16(sum[half], first, columns);
          ptx::mma_16x8x16_bf16(sum[half], second, columns);
        }
      };
      multiply(0);
      if (groups > 1) {
#pragma unroll 1
        for (int group = 1; group < groups; ++group) {
          load_weights(group, block, first, second);
          multiply(group);
        }
        load_weights(0, block, first, second);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = begin + half * 8 + of_pair * 2;
        if (!there || t >= r.steps) continue;
        float* both = to + begin + half * 8;
        if (p.steps % 2 == 0) {
          ptx::store(reinterpret_cast<uint2*>(both),
                     {float_to_bits(unit * sum[half][0]), float_to_bits(unit * sum[half][1])});
        } else {
          both[0] = unit * sum[half][0];
          if (t + 1 < r.steps) both[1] = unit * sum[half][1];
        }
      }
    }
  }
}

// ddt_weight += ddelta dt^T along a round: each helper has some of the steps, and sums of its own.
__device__ __forceinline__ void add_to_dt_weight(const BwdParams& p, const PairMemory& memory,
                                                 const Round& r, int number, int helper) {
  const PairLayout& at = memory.at;
  const int steps = OfPair::kSteps * at.team, pitch = ddelta_pitch(steps);
  const int groups = (at.pairs + kPairsOfGroup - 1) / kPairsOfGroup, lane = ptx::lane();
  const bool fresh = r.begin + steps >= p.steps;  // the first round that comes by
  // The lane's row of left_of.
  const BFloat16* row = ddelta_of(memory, 0) + lane % 16 * pitch + lane / 16 * 8;
  const auto* dt = memory.get<uint4>(memory.rows(number));
#pragma unroll 1
  for (int i = 0; i < groups * at.rank_blocks; ++i) {
    const int group = i / at.rank_blocks, block = i % at.rank_blocks;
    auto& sum = several<4>(memory.get<float>(
        at.helper_sums)[((helper * groups * at.rank_blocks + i) * 32 + lane) * 4]);
    float d[4] = {};
    if (!fresh) {
#pragma unroll
      for (int k = 0; k < 4; ++k) d[k] = sum.x[k];
    }
#pragma unroll 1
    for (int b = block; b < at.dt_blocks; b += at.rank_blocks) {  // both terms of dt
#pragma unroll 2
      for (int t = helper * 32; t < r.tiles * OfPair::kSteps; t += at.helpers * 32) {
        uint32_t ranks[4];
        ptx::ldmatrix_x4_trans(ranks, dt + b * steps + dt_unit(t + lane));
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          uint32_t ddelta[4];
          ptx::ldmatrix_x4(ddelta, row + group * 16 * pitch + t + k * 16);
          const uint32_t half[2] = {ranks[2 * k], ranks[2 * k + 1]};
          ptx::mma_16x8x16_bf16(d, ddelta, half);
        }
      }
    }
    sum = {{d[0], d[1], d[2], d[3]}};
  }
}

// Of a route, by the first helper.
__device__ __forceinline__ void write_dt_weight(const BwdParams& p, const PairMemory& memory,
                                                int route) {
  const PairLayout& at = memory.at;
  const Task& task = memory.now().task;
  const int groups = (at.pairs + kPairsOfGroup - 1) / kPairsOfGroup, lane = ptx::lane();
#pragma unroll 1
  for (int i = 0; i < groups * at.rank_blocks; ++i) {
    float d[4] = {};
#pragma unroll 1
    for (int helper = 0; helper < at.helpers; ++helper) {
      const auto sum = several<4>(memory.get<float>(
          at.helper_sums)[((helper * groups * at.rank_blocks + i) * 32 + lane) * 4]);
#pragma unroll
      for (int k = 0; k < 4; ++k) d[k] += sum.x[k];
    }
    const int channel = i / at.rank_blocks * 8 + lane / 4;
    const int rank = i % at.rank_blocks * 8 + lane % 4 * 2;
    if (channel >= task.channels) continue;
    float* to = static_cast<float*>(p.ddt_weight) +
                ((task.b * p.routes + route) * p.dim + task.channel + channel) * p.rank;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (rank + k < p.rank) to[rank + k] = d[k] + d[2 + k];  // of both terms of ddelta
    }
  }
}

}  // namespace statescan::selective_scan_2d::cuda
