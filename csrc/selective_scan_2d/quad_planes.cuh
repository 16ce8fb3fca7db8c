// From a map to the planes of quads, and back: of four channels and eight neighbouring tokens at a time
// where the map allows it.
#pragma once

#include "selective_scan_2d/pairs.cuh"
#include "selective_scan_2d/planes.cuh"

namespace statescan::selective_scan_2d::cuda {

inline constexpr int kQuad = 4, kTokensAtOnce = 8;
using Numbers = Several<float, kQuad>;  // of each channel

// Can the block's 16-bit elements be moved eight tokens at a time?
__device__ __forceinline__ bool has_packs(const View<4>& x, const Task& task, int tokens) {
  const auto* first = first_token<const uint16_t>(x, task);
  return element_bytes(x.dtype) == 2 && x.stride[3] == 1 && tokens % kTokensAtOnce == 0 &&
         task.channels % kQuad == 0 && is_aligned(first, x.stride[2], kTokensAtOnce);
}

// Calls f(quad, token) for all quads and every eighth token, by the first `threads` threads of the block.
template <class F>
__device__ __forceinline__ void for_packs_of_quads(const Task& task, int tokens, int threads,
                                                   F&& f) {
  const int packs = tokens / kTokensAtOnce, all = task.channels / kQuad * packs;
#pragma unroll 1
  for (int i = ptx::opaque(int(threadIdx.x)); i < all; i += threads) {
    const int quad = int(unsigned(i) / unsigned(packs));
    f(quad, (i - quad * packs) * kTokensAtOnce);
  }
}

// u -> words, by the first `threads` threads of the block. Eight tokens lie side by side there, too.
__device__ __forceinline__ void read_quads(const View<4>& u, const PairMemory& memory, int tokens,
                                           int threads) {
  const Task& task = memory.now().task;
  const PairLayout& at = memory.at;
  if (!has_packs(u, task, tokens)) {
    read_halves(u, task, 0, tokens, threads, [&](int c, int t) -> uint16_t& {
      return memory.get<uint16_t>(memory.words(c / kQuad))[at.position(t) * kQuad + c % kQuad];
    });
    return;
  }
  const auto* first = first_token<const uint16_t>(u, task);
  for_packs_of_quads(task, tokens, threads, [&](int quad, int t) {
    uint32_t channel[kQuad][4];
    const uint16_t* from = first + quad * kQuad * u.stride[2] + t;
#pragma unroll
    for (int c = 0; c < kQuad; ++c, from += u.stride[2]) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
      channel[c][0] = v.x, channel[c][1] = v.y, channel[c][2] = v.z, channel[c][3] = v.w;
    }
    auto* to = memory.get<Several<uint32_t, 2>>(memory.words(quad)) + at.position(t);
#pragma unroll
    for (int j = 0; j < kTokensAtOnce; ++j) {
      to[j] = {{ptx::pair_halves(j % 2, channel[0][j / 2], channel[1][j / 2]),
                ptx::pair_halves(j % 2, channel[2][j / 2], channel[3][j / 2])}};
    }
  });
}

// The sum of w D over the visits of a token by all routes: visits(route).
template <class F>
__device__ __forceinline__ Numbers skips_of_token(const PairMemory& memory, int quad, int routes,
                                                  F&& visits) {
  Numbers sum{};
#pragma unroll 1
  for (int route = 0; route < routes; ++route) {
    const float* table = memory.get<float>(memory.table(route, quad));
    const float times = visits(route);
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      sum.x[c] += times * table[kItemWeight * kQuad + c] * table[kItemD * kQuad + c];
    }
  }
  return sum;
}

// What y is at a token: the sum there, and D u.
__device__ __forceinline__ Numbers with_skip(const Numbers& sum, const Several<uint32_t, 2>& word,
                                             DType dtype, const Numbers& D) {
  Numbers y;
  with_half_type(dtype, [&](auto type) {
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      y.x[c] = sum.x[c] + D.x[c] * half_of_word<decltype(type)>(word.x[c / 2], c % 2);
    }
  });
  return y;
}

// sums += w D u for every visit, where they are counted.
__device__ __forceinline__ void add_counted_skips(const FwdParams& p, const PairMemory& memory) {
  const Task& task = memory.now().task;
  const int64_t first = (p.place_per_batch ? task.b : 0) * p.routes * p.tokens;
#pragma unroll 1
  for (int quad = 0; quad * kQuad < task.channels; ++quad) {
    const auto* words = memory.get<Several<uint32_t, 2>>(memory.words(quad));
    auto* sums = memory.get<Numbers>(memory.sums(quad));
#pragma unroll 1
    for (int t = ptx::opaque(int(threadIdx.x)); t < int(p.tokens); t += int(blockDim.x)) {
      bool visited = false;
      const Numbers D = skips_of_token(memory, quad, int(p.routes), [&](int route) {
        const int visits = __ldg(p.visits + first + route * p.tokens + t);
        visited |= visits > 0;
        return float(visits);
      });
      const int at = memory.at.position(t);
      if (visited) sums[at] = with_skip(sums[at], words[at], p.u.dtype, D);  // else whatever u is
    }
  }
}

// (sums + D u) silu(z) -> y, eight tokens at a time.
template <class T, class Z>
__device__ __forceinline__ void write_packs(const FwdParams& p, const PairMemory& memory,
                                            bool skips) {
  const Task& task = memory.now().task;
  for_packs_of_quads(task, int(p.tokens), int(blockDim.x), [&](int quad, int t) {
    const Numbers D =
        skips_of_token(memory, quad, skips ? int(p.routes) : 0, [](int) { return 1.0f; });
    const int at = memory.at.position(t);
    const auto* words = memory.get<Several<uint32_t, 2>>(memory.words(quad)) + at;
    const auto* sums = memory.get<Numbers>(memory.sums(quad)) + at;
    float y[kQuad][kTokensAtOnce];
#pragma unroll
    for (int j = 0; j < kTokensAtOnce; ++j) {
      Numbers of_token = sums[j];
      if (skips) of_token = with_skip(of_token, words[j], p.u.dtype, D);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) y[c][j] = of_token.x[c];
    }
    const int64_t channel = task.channel + quad * kQuad;
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      if (p.z) {
        const auto* from = static_cast<const Z*>(p.z.data) + task.b * p.z.stride[0] +
                           (channel + c) * p.z.stride[1] + t;
        float z[kTokensAtOnce];
        Pack<Z, kTokensAtOnce>::load(from).unpack(z);
#pragma unroll
        for (int j = 0; j < kTokensAtOnce; ++j) y[c][j] = meet(Meet::kTimesSilu, y[c][j], z[j]);
      }
      auto* to =
          static_cast<T*>(p.y.data) + task.b * p.y.stride[0] + (channel + c) * p.y.stride[2] + t;
      Pack<T, kTokensAtOnce>::of(y[c]).store(to);
    }
  });
}

// y -> map, with D u and the gate, by all threads of the block.
__device__ __forceinline__ void write_quads(const FwdParams& p, const PairMemory& memory) {
  const Task& task = memory.now().task;
  const bool once = p.visits != nullptr && *p.visited_otherwise == 0;
  const bool packs = has_packs(p.y, task, int(p.tokens)) &&
                     (!p.z || has_packs(with_routes(p.z), task, int(p.tokens)));
  if (p.visits != nullptr && !(once && packs)) {
    add_counted_skips(p, memory);
    __syncthreads();  // all terms have been added
  }
  if (packs) {
    with_half_type(p.y.dtype, [&](auto type) {
      with_half_type(p.z ? p.z.dtype : p.y.dtype, [&](auto of_z) {
        write_packs<decltype(type), decltype(of_z)>(p, memory, once);
      });
    });
    return;
  }
  const PairSums<kQuad> y(memory);
  if (p.z) {
    read_tokens(with_routes(p.z), task, 0, p.tokens, Meet::kTimesSilu, y);
    __syncthreads();  // y is gated
  }
  write_tokens(p.y, task, 0, p.tokens, y);
}

}  // namespace statescan::selective_scan_2d::cuda
