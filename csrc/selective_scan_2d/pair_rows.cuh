// What the warps without channels bring for pairs of channels, see pairs.cuh: a route's parameters, and
// of each round places, B, C and low-rank delta.
#pragma once

#include "common/device_view.cuh"
#include "selective_scan_2d/pairs.cuh"

namespace statescan::selective_scan_2d::cuda {

// Where step t of a round is in a row.
__device__ __forceinline__ int in_round_row(int t) {
  return (t & ~(OfPair::kSteps - 1)) + in_row<OfPair>(t & (OfPair::kSteps - 1));
}
// 0 where nothing is to be read: past the end, at steps to skip, and without `ghosts` at those as well.
template <class T>
__device__ __forceinline__ float number_at(const T* from, const View<4>& x, const Round& r, int row,
                                           int t, bool ghosts) {
  const int place = t < r.steps ? int(__ldg(r.place + t)) : int(kSkip);
  const bool there = place >= 0 || (place == kGhost && ghosts);
  return there ? to_number(from[row * x.stride[2] + t * x.stride[3]]) : 0.0f;
}

// rows[i][t] = scale x[b, route, i, begin + t]
template <class T>
__device__ __forceinline__ void stage_round_rows(const T* from, const View<4>& x, const Round& r,
                                                 const PairLayout& at, int count, float scale,
                                                 int thread, float* rows) {
  constexpr int kVec = kPackSize<T>;
  const int threads = 16 * at.helpers;
  const int steps = at.buffer_tiles * OfPair::kSteps;
  if (!(r.flags & kGhosts) && x.stride[3] == 1 && is_aligned(from, x.stride[2], kVec)) {
#pragma unroll 1
    for (int row = 0; row < count; ++row, from += x.stride[2], rows += steps) {
#pragma unroll 2
      for (int t = thread * kVec; t < steps; t += threads * kVec) {
        float v[kVec] = {};
        if (t + kVec <= r.steps) {
          Pack<T, kVec>::load(from + t).unpack(v);
        } else if (t < r.steps) {
#pragma unroll
          for (int j = 0; j < kVec; ++j) v[j] = t + j < r.steps ? to_number(from[t + j]) : 0.0f;
        }
        float* to = rows + in_round_row(t);
#pragma unroll
        for (int j = 0; j < kVec; j += 4) {  // four neighbours in time are neighbours in a row
          several<4>(to[j * 32]) = {v[j] * scale, v[j + 1] * scale, v[j + 2] * scale,
                                    v[j + 3] * scale};
        }
      }
    }
    return;
  }
  const bool time_inside = x.stride[3] <= x.stride[2];
  const int total = (time_inside ? count : (count + 7) / 8 * 8) * steps;
#pragma unroll 2
  for (int i = thread; i < total; i += threads) {
    const int outer = (time_inside ? i : i / 8) / steps;
    const int t = (time_inside ? i : i / 8) - outer * steps;
    const int row = time_inside ? outer : outer * 8 + i % 8;
    if (row < count) {
      rows[row * steps + in_round_row(t)] = scale * number_at(from, x, r, row, t, false);
    }
  }
}

// Eight steps of eight ranks, to the units of which the first is `unit`.
template <class T>
__device__ __forceinline__ void put_ranks_of_steps(const uint32_t (&rows)[8][4], uint4* to,
                                                   int unit, int to_second) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      uint32_t pair[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pair[i] = ptx::pair_halves(j % 2, rows[2 * i][j / 2], rows[2 * i + 1][j / 2]);
      }
      to[unit ^ j] = {pair[0], pair[1], pair[2], pair[3]};
    } else {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = to_number(T{uint16_t(rows[i][j / 2] >> j % 2 * 16)});
      store_terms(v, to + (unit ^ j), to + (unit ^ j) + to_second);
    }
  }
}

template <class T>
__device__ __forceinline__ void stage_ranks(const T* from, const View<4>& x, const Round& r,
                                            const PairLayout& at, int rank, int thread, uint4* dt) {
  const int threads = 16 * at.helpers;
  const int steps = at.buffer_tiles * OfPair::kSteps, to_second = at.rank_blocks * steps;
  auto step = [&](int block, int t) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = block * 8 + i;
      v[i] = row < rank ? number_at(from, x, r, row, t, true) : 0.0f;
    }
    uint4* to = dt + block * steps + dt_unit(t);
    store_terms(v, to, std::is_same_v<T, BFloat16> ? nullptr : to + to_second);
  };
  const bool packed = !(r.flags & kGhosts) && x.stride[3] == 1 && is_aligned(from, x.stride[2], 8);
  const int whole = packed ? r.steps & ~7 : 0;  // steps read eight at a time
#pragma unroll 1
  for (int block = 0; block < at.rank_blocks; ++block) {
    const T* row = from + block * 8 * x.stride[2];
#pragma unroll 1
    for (int t = thread * 8; t < whole; t += threads * 8) {
      uint32_t rows[8][4];
      const T* first = row + t;
#pragma unroll
      for (int i = 0; i < 8; ++i, first += x.stride[2]) {
        uint4 v{};
        if (block * 8 + i < rank) v = __ldg(reinterpret_cast<const uint4*>(first));
        rows[i][0] = v.x, rows[i][1] = v.y, rows[i][2] = v.z, rows[i][3] = v.w;
      }
      put_ranks_of_steps<T>(rows, dt + block * steps, dt_unit(t), to_second);
    }
#pragma unroll 1
    for (int t = whole + thread; t < steps; t += threads) step(block, t);
  }
}

// Parameters of `routes` routes from `first`, by the helpers. With softplus the step sizes are counted in
// units of ln 2, which their logarithm to base 2 is; the unit goes into B.
// `start`: the state, or its gradient, that a walk along the route begins with.
__device__ __forceinline__ void stage_tables(const Inputs& p, const PairMemory& memory, int first,
                                             int routes, const View<4>& start) {
  const PairLayout& at = p.plan.pair;
  const int threads = 32 * at.helpers;
  const int thread = ptx::opaque(int(threadIdx.x)) - int(blockDim.x) + threads;
  const Task& task = memory.now().task;
  const int channels = at.channels * at.pairs, ranks = 8 * at.rank_blocks;
  const float scale = p.delta_softplus ? float(kLog2e) : 1.0f;
  auto table = [&](int route, int c, int item) -> float& {
    return memory.get<float>(
        memory.table(route, c / at.channels))[item * at.channels + c % at.channels];
  };
  // Weights by all, the rest from the last thread on: loads of both are on their way together.
#pragma unroll 2
  for (int i = thread; i < routes * channels * ranks; i += threads) {
    const int outer = i / ranks, r = i % ranks, route = first + outer / channels,
              c = outer % channels;
    const View<3>& x = p.dt_weight;
    float w = 0;
    if (c < task.channels && r < p.rank) {
      w = scale * load_element<float>(
                      x.data, x.dtype,
                      route * x.stride[0] + (task.channel + c) * x.stride[1] + r * x.stride[2]);
    }
    auto* to = memory.get<BFloat16>(memory.weight(route, c / at.channels)) +
               (c % at.channels / 2 * at.rank_blocks + r / 8) * 32 + c % 2 * 8;
    const BFloat16 term = from_number<BFloat16>(w);
    to[r % 8] = term, to[16 + r % 8] = from_number<BFloat16>(w - to_number(term));
  }
#pragma unroll 1
  for (int i = threads - 1 - thread; i < routes * channels; i += threads) {
    const int route = first + i / channels, c = i % channels;
    const bool there = c < task.channels;
    const Parameters<float> k(p, route, task.channel + (there ? c : 0));
    table(route, c, kItemD) = k.D, table(route, c, kItemWeight) = k.weight;
    table(route, c, kItemBias) = k.bias * scale;
  }
  const int states = int(p.state);
#pragma unroll 1
  for (int i = threads - 1 - thread; i < routes * channels * states; i += threads) {
    const int n = i % states, outer = i / states;
    const int route = first + outer / channels, c = outer % channels;
    const int64_t channel = task.channel + c;
    float A = 0, h = 0;
    if (c < task.channels) {
      A = load_element<float>(p.A.data, p.A.dtype,
                              route * p.A.stride[0] + channel * p.A.stride[1] + n * p.A.stride[2]);
      if (start) {
        h = load_element<float>(start.data, start.dtype,
                                state_offset(start, task.b, route, channel) + n * start.stride[3]);
      }
    }
    const int item = kItemStates + kStateItems * n;
    table(route, c, item + kItemA) = p.delta_softplus ? A : A * float(kLog2e);
    table(route, c, item + kItemH) = table(route, c, item + kItemH + 1) = h;
  }
}

// Brings a round, which is the block's `number`-th, by half of the helpers low-rank delta, by the others
// all else: as many loads as can be are on their way together.
__device__ __forceinline__ void stage_round(const Inputs& p, const PairMemory& memory,
                                            const Round& r, int number) {
  const PairLayout& at = p.plan.pair;
  const int threads = 16 * at.helpers;
  int thread = ptx::opaque(int(threadIdx.x)) - int(blockDim.x) + 2 * threads;
  const int rows = memory.rows(number);
  auto first = [&](auto* type, const View<4>& x) {
    using T = std::remove_pointer_t<decltype(type)>;
    return static_cast<const T*>(x.data) + memory.now().task.b * x.stride[0] +
           r.route * x.stride[1] + r.begin * x.stride[3];
  };
  if (thread >= threads) {
    with_device_type(p.delta.dtype, [&](auto* type) {
      if constexpr (sizeof(*type) == 2) {
        stage_ranks(first(type, p.delta), p.delta, r, at, int(p.rank), thread - threads,
                    memory.get<uint4>(rows));
      }
    });
    return;
  }
  if (thread == 0) memory.now().flags[number & 1] = r.flags;
  int* place = memory.get<int>(rows + at.place);
#pragma unroll 4
  for (int t = 4 * thread; t < r.tiles * OfPair::kSteps; t += 4 * threads) {
    *reinterpret_cast<uint4*>(place + in_round_row(t)) =
        __ldg(reinterpret_cast<const uint4*>(r.place + t));
  }
  const float scale = p.delta_softplus ? float(kLn2) : 1.0f;
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const View<4>& x = which == 0 ? p.B : p.C;
    with_device_type(x.dtype, [&](auto* type) {
      if constexpr (sizeof(*type) <= 4) {
        stage_round_rows(first(type, x), x, r, at, int(p.state), which == 0 ? scale : 1.0f, thread,
                         memory.get<float>(rows + (which == 0 ? at.B : at.C)));
      }
    });
  }
}

// All rounds, each while the others walk the one before; backward: those of a route from the last to
// the first. end_round(round, number, last) is what follows when a round has been walked.
template <class F>
__device__ __forceinline__ void stage_routes(const Inputs& p, const PairMemory& memory,
                                             const View<4>& start, bool backward, F&& end_round) {
  const int rounds = rounds_of(p), all = rounds * int(p.routes);
  auto at = [&](int route, int i) {
    return round_at(p, memory.now().task.b, route, backward ? rounds - 1 - i : i);
  };
  Round r = at(0, 0), before{};
#pragma unroll 1
  for (int number = 0, i = 0, route = 0; number < all; ++number) {
    if (i == 0) stage_tables(p, memory, route, 1, start);
    stage_round(p, memory, r, number);
    const Round now = r;
    const bool last = i == 0;  // the round before was, of its route
    if (++i == rounds) i = 0, ++route;
    // On its way while the others walk.
    if (number + 1 < all) r = at(route, i);
    __syncthreads();  // the round before has been walked, this one is in place
    if (number > 0) end_round(before, number - 1, last);
    before = now;
  }
  __syncthreads();  // the last round has been walked
  end_round(before, all - 1, true);
}

}  // namespace statescan::selective_scan_2d::cuda
