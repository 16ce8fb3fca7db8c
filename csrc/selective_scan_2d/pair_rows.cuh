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
// Where rows of a route begin, in elements: 32 bits of them, see steps_at_once.
struct RouteRows {
  int delta = 0, B = 0, C = 0;

  __device__ __forceinline__ void begin(const Inputs& p, int64_t b, int route) {
    auto first = [&](const View<4>& x) { return int(b * x.stride[0] + route * x.stride[1]); };
    delta = first(p.delta), B = first(p.B), C = first(p.C);
  }
};

// Eight neighbouring steps of a row, a pack at a time, and zeros from the `there`-th on.
template <class Pack>
__device__ __forceinline__ void load_eight(const uint16_t* from, int there, uint32_t (&x)[4]) {
  constexpr int kWords = sizeof(Pack) / 4;
#pragma unroll
  for (int i = 0; i < 4; i += kWords) {
    Pack v{};
    if (2 * i < there) v = __ldg(reinterpret_cast<const Pack*>(from + 2 * i));
    x[i] = v.x, x[i + 1] = v.y;
    if constexpr (kWords == 4) x[i + 2] = v.z, x[i + 3] = v.w;
  }
}

// Eight steps of eight ranks, to the units of which the first is at `unit`, in bytes.
template <class T>
__device__ __forceinline__ void put_ranks(const PairMemory& memory, const uint32_t (&rows)[8][4],
                                          int unit, int to_second) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    auto* to = memory.get<uint4>(unit ^ j * 16);
    if constexpr (std::is_same_v<T, BFloat16>) {
      uint32_t pair[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pair[i] = ptx::pair_halves(j % 2, rows[2 * i][j / 2], rows[2 * i + 1][j / 2]);
      }
      *to = {pair[0], pair[1], pair[2], pair[3]};
    } else {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = to_number(T{uint16_t(rows[i][j / 2] >> j % 2 * 16)});
      uint4 term, rest;
      store_terms(v, &term, &rest);
      *to = term, to[to_second] = rest;
    }
  }
}

// Eight steps of a row of B or C: four neighbours in time are neighbours there, too.
template <class T>
__device__ __forceinline__ void put_numbers(const uint32_t (&words)[4], float scale, float* to) {
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = scale * to_number(T{uint16_t(words[j / 2] >> j % 2 * 16)});
#pragma unroll
  for (int j = 0; j < 8; j += 4)
    several<4>(to[in_row<OfPair>(j)]) = {v[j], v[j + 1], v[j + 2], v[j + 3]};
}

// The warps that bring a round, and who of them it is.
struct Crew {
  int warp, warps, lane;
};

// A round in packs of neighbouring steps: eight steps by a lane, a tile by a warp. Eight ranks and a state
// are on their way together; tiles are dealt to the helpers in turn, whatever they are of.
// begin_tile(tile): before the first rows of a tile are put where they belong.
template <class T, class Pack, class F>
__device__ __forceinline__ void stage_packs(const Inputs& p, const PairMemory& memory,
                                            const RouteRows& from, const Round& r, int rows,
                                            int states, const Crew& crew, F&& begin_tile) {
  const PairLayout& at = p.plan.pair;
  const int steps = at.buffer_tiles * OfPair::kSteps;
  const int all = at.rank_blocks > states ? at.rank_blocks : states;
  const float scale = p.delta_softplus ? float(kLn2) : 1.0f;
  auto at_row = [](const View<4>& x, int i) { return static_cast<const uint16_t*>(x.data) + i; };
  const int begin = int(r.begin);
  int delta = from.delta + begin, B = from.B + begin, C = from.C + begin;
#pragma unroll 1
  for (int k = 0, tile = crew.warp; k < all; ++k, tile -= r.tiles) {
    const int ranks = int(p.rank) - 8 * k;
#pragma unroll 1
    for (; tile < r.tiles; tile += crew.warps) {
      const int first = tile * OfPair::kSteps, t = first + crew.lane * 8;
      const int there = sizeof(Pack) == 16 ? (t < r.steps ? 8 : 0) : r.steps - t;
      uint32_t rank_row[8][4], B_row[4], C_row[4];
      const uint16_t* row = at_row(p.delta, delta + t);
#pragma unroll
      for (int i = 0; i < 8; ++i, row += p.delta.stride[2]) {
        load_eight<Pack>(row, i < ranks ? there : 0, rank_row[i]);
      }
      load_eight<Pack>(at_row(p.B, B + t), k < states ? there : 0, B_row);
      load_eight<Pack>(at_row(p.C, C + t), k < states ? there : 0, C_row);
      if (k == 0) {
        const auto* place = reinterpret_cast<const uint4*>(r.place + t);
        const uint4 low = __ldg(place), high = __ldg(place + 1);
        begin_tile(tile);
        auto* to = memory.get<uint4>(rows + at.place) + tile * (OfPair::kSteps / 4) + crew.lane;
        to[0] = low, to[in_row<OfPair>(4) / 4] = high;
      }
      if (k < states) {
        const int to = rows + (k * steps + first + crew.lane * 4) * 4;
        put_numbers<T>(B_row, scale, memory.get<float>(to + at.B));
        put_numbers<T>(C_row, 1, memory.get<float>(to + at.C));
      }
      if (ranks > 0) {
        put_ranks<T>(memory, rank_row, rows + (k * steps + first + dt_unit(crew.lane * 8)) * 16,
                     at.rank_blocks * steps);
      }
    }
    delta += 8 * int(p.delta.stride[2]), B += int(p.B.stride[2]), C += int(p.C.stride[2]);
  }
}

// Step t of an operand's first row along a round.
template <class T>
__device__ __forceinline__ const T* row_at(const View<4>& x, int64_t b, const Round& r, int t) {
  return static_cast<const T*>(x.data) + b * x.stride[0] + r.route * x.stride[1] +
         (r.begin + t) * x.stride[3];
}

// The same step by step: rows that lie otherwise, and steps of no token, which are not read (but delta
// at ghosts).
__device__ __forceinline__ void stage_steps(const Inputs& p, const PairMemory& memory,
                                            const Round& r, int rows, const Crew& crew) {
  const PairLayout& at = p.plan.pair;
  const int64_t b = memory.now().task.b;
  const int steps = at.buffer_tiles * OfPair::kSteps;
  auto for_steps = [&](auto&& f) {
#pragma unroll 1
    for (int t = crew.warp * 32 + crew.lane; t < r.tiles * OfPair::kSteps; t += crew.warps * 32) {
      f(t, t < r.steps ? int(__ldg(r.place + t)) : int(kSkip));
    }
  };
  int* place_row = memory.get<int>(rows + at.place);
  for_steps([&](int t, int place) { place_row[in_round_row(t)] = place; });
  with_device_type(p.delta.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == 2) {
      for_steps([&](int t, int place) {
        const T* from = row_at<T>(p.delta, b, r, t);
        uint4* to = memory.get<uint4>(rows) + dt_unit(t);
#pragma unroll 1
        for (int row = 0; row < p.rank; row += 8, to += steps) {
          float v[8] = {};
          if (place != kSkip) {
#pragma unroll
            for (int i = 0; i < 8; ++i, from += p.delta.stride[2]) {
              if (row + i < p.rank) v[i] = to_number(*from);
            }
          }
          const bool exact = std::is_same_v<T, BFloat16>;
          store_terms(v, to, exact ? nullptr : to + at.rank_blocks * steps);
        }
      });
    }
  });
  auto stage = [&](const View<4>& x, float scale, float* to) {
    with_device_type(x.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (sizeof(T) <= 4) {
        for_steps([&](int t, int place) {
          const T* from = row_at<T>(x, b, r, t);
#pragma unroll 1
          for (int n = 0; n < p.state; ++n, from += x.stride[2]) {
            to[n * steps + in_round_row(t)] = place >= 0 ? scale * to_number(*from) : 0.0f;
          }
        });
      }
    });
  };
  stage(p.B, p.delta_softplus ? float(kLn2) : 1.0f, memory.get<float>(rows + at.B));
  stage(p.C, 1, memory.get<float>(rows + at.C));
}

// Parameters of `routes` routes from `first`, by `threads` threads. With softplus the step sizes are
// counted in units of ln 2, which their logarithm to base 2 is; the unit goes into B.
// `start`: the state, or its gradient, that a walk along the route begins with.
__device__ __forceinline__ void stage_tables(const Inputs& p, const PairMemory& memory, int first,
                                             int routes, const View<4>& start, int thread,
                                             int threads) {
  const PairLayout& at = p.plan.pair;
  const Task& task = memory.now().task;
  const int channels = at.channels * at.pairs, ranks = 8 * at.rank_blocks;
  const float scale = p.delta_softplus ? float(kLog2e) : 1.0f;
  auto table = [&](int route, int c, int item) -> float& {
    return memory.get<float>(
        memory.table(route, c / at.channels))[item * at.channels + c % at.channels];
  };
  // Weights by all, the rest from the last thread on: loads of both are on their way together.
#pragma unroll 1
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

// Brings a round, which is the block's `number`-th. wait(): until its buffer is free, while the first of
// its rows are on their way.
template <class F>
__device__ __forceinline__ void stage_round(const Inputs& p, const PairMemory& memory,
                                            const RouteRows& from, const Round& r, int number,
                                            int states, const Crew& crew, F&& wait) {
  const PairLayout& at = p.plan.pair;
  const int rows = memory.rows(number);
  auto begin_tile = [&](int tile) {
    wait();
    if (tile == 0 && crew.lane == 0) memory.flags(number) = r.flags;
  };
  if (at.at_once == 1 || r.flags & kGhosts) {
    for (int tile = crew.warp; tile < r.tiles; tile += crew.warps) begin_tile(tile);
    stage_steps(p, memory, r, rows, crew);
  } else {
    auto stage = [&](auto pack) {
      with_half_type(p.delta.dtype, [&](auto type) {
        stage_packs<decltype(type), decltype(pack)>(p, memory, from, r, rows, states, crew,
                                                    begin_tile);
      });
    };
    at.at_once == 8 ? stage(uint4{}) : stage(uint2{});
  }
}

// Asks for what the block reads that begins when this one ends, if as many are at work as an H100 has
// multiprocessors: then it comes from the second-level cache. Its map, and its share of the rows of its
// batch element, which other blocks read as well.
__device__ __forceinline__ void ask_for_later_block(const Inputs& p, const Crew& crew) {
  constexpr int kBlocksAtWork = 132, kElements = 16;  // of 32 bytes
  const int64_t block = int64_t(blockIdx.x) + kBlocksAtWork;
  if (block >= gridDim.x) return;
  const int thread = crew.warp * 32 + crew.lane, threads = crew.warps * 32;
  const Task task = task_at(p, block);
  auto ask_for_line = [&](const uint16_t* from, int64_t count) {
#pragma unroll 1
    for (int64_t t = thread * kElements; t < count; t += threads * kElements) {
      ptx::prefetch(from + t);
    }
  };
  auto of_batch = [&](const View<4>& x) {
    return static_cast<const uint16_t*>(x.data) + task.b * x.stride[0];
  };
  const auto* map = first_token<const uint16_t>(p.u, task);
  if (p.u.stride[3] == 1) {
#pragma unroll 1
    for (int c = 0; c < task.channels; ++c) ask_for_line(map + c * p.u.stride[2], p.tokens);
  } else {  // the channels of a token are neighbours
#pragma unroll 1
    for (int64_t t = thread; t < p.tokens; t += threads) ptx::prefetch(map + t * p.u.stride[3]);
  }
  if (p.plan.pair.at_once == 1) return;
  const int states = int(p.state), rows = int(p.rank) + 2 * states;
#pragma unroll 1
  for (int64_t i = task.block; i < p.routes * rows; i += p.plan.blocks) {
    const int route = int(i) / rows, row = int(i) % rows, state = row - int(p.rank);
    const View<4>& x = state < 0 ? p.delta : state < states ? p.B : p.C;
    const int of_x = state < 0 ? row : state % states;
    ask_for_line(of_batch(x) + route * x.stride[1] + of_x * x.stride[2], p.steps);
  }
}

// All rounds, each while the others walk the one before; backward: those of a route from the last to
// the first. end_round(round, number, last) is what follows when a round has been walked.
template <class F>
__device__ __forceinline__ void stage_routes(const Inputs& p, const PairMemory& memory,
                                             const View<4>& start, bool backward, F&& end_round) {
  const int rounds = p.plan.pair.rounds, all = rounds * int(p.routes);
  auto at = [&](int route, int i) {
    return round_at(p, memory.now().task.b, route, backward ? rounds - 1 - i : i);
  };
  const int thread = ptx::opaque(int(threadIdx.x)) - int(blockDim.x) + 32 * p.plan.pair.helpers;
  const Crew crew{thread >> 5, p.plan.pair.helpers, thread & 31};
  ask_for_later_block(p, crew);
  Round r = at(0, 0), before{};
  RouteRows rows;
#pragma unroll 1
  for (int number = 0, i = 0, route = 0; number < all; ++number) {
    if (i == 0) {
      stage_tables(p, memory, route, 1, start, thread, 32 * p.plan.pair.helpers);
      rows.begin(p, memory.now().task.b, route);
    }
    stage_round(p, memory, rows, r, number, int(p.state), crew, [] {});
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
