// The steps of a part as a lane walks them, 8 at a time; see parts.cuh.
#pragma once

#include "common/scalar.cuh"
#include "selective_scan/equations.h"
#include "selective_scan_2d/parts.cuh"

namespace statescan::selective_scan_2d::cuda {

using Numbers = float[kSome];  // of neighbouring steps

// Of a row, the same for all lanes.
__device__ __forceinline__ void load_numbers(float* row, Numbers& x) {
#pragma unroll
  for (int i = 0; i < kSome; i += 4) {
    const auto v = several<4>(row[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i + j] = v.x[j];
  }
}

// Where kSome steps are; whether any is of no token.
struct Places {
  int at[kSome];
  bool holes;

  __device__ __forceinline__ Places(const PartMemory& memory, int t) {
    int least = 0;
#pragma unroll
    for (int i = 0; i < kSome; i += 4) {
      const auto v = several<4>(memory.place[t + i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        at[i + j] = v.x[j];
        least = least < v.x[j] ? least : v.x[j];
      }
    }
    holes = least < 0;
  }
};
// Bits of the steps from `first` on before which the state starts anew.
__device__ __forceinline__ unsigned find_starts(const Inputs& p, int64_t first) {
  unsigned starts = 0;
  if (p.reset_period > 0) {
#pragma unroll 1
    for (int j = 0; j < kSome && first + j < p.steps; ++j) {
      starts |= unsigned(p.resets_at(first + j)) << j;
    }
  }
  return starts;
}

// A lane's number of a token. As the line is no constant, one multiply-add finds it.
template <class T>
__device__ __forceinline__ T& at_token(const Inputs& p, T* column, int place) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return *reinterpret_cast<T*>(reinterpret_cast<Byte*>(column) +
                               uint64_t(uint32_t(place)) * uint32_t(p.parts.line_bytes));
}
// A lane's numbers of a plane: 0 at steps of no token.
__device__ __forceinline__ void load_tokens(const Inputs& p, const float* column,
                                            const Places& place, Numbers& x) {
#pragma unroll
  for (int j = 0; j < kSome; ++j) {
    x[j] = place.at[j] >= 0 ? at_token(p, column, place.at[j]) : 0.0f;
  }
}

// column += scale x, in the order of the steps. `sum`: what load_tokens found, where no token comes
// twice.
__device__ __forceinline__ void add_tokens(const Inputs& p, float* column, const Places& place,
                                           bool repeats, float scale, const Numbers& sum,
                                           const Numbers& x) {
#pragma unroll
  for (int j = 0; j < kSome; ++j) {
    if (place.at[j] < 0) continue;
    float& to = at_token(p, column, place.at[j]);
    to = (repeats ? to : sum[j]) + scale * x[j];
  }
}

// delta of the lane's channel as it is given whole.
__device__ __forceinline__ void load_delta(const Inputs& p, const PartTask& task, int64_t t,
                                           Numbers& x) {
  const View<4>& v = p.delta;
  const int64_t row = p.delta_repeat > 1 ? task.channel / p.delta_repeat : task.channel;
  const int64_t first =
      task.b * v.stride[0] + task.route * v.stride[1] + row * v.stride[2] + t * v.stride[3];
  with_device_type(v.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= 4) {
      const T* from = static_cast<const T*>(v.data) + first;
      constexpr int kPack = kPackSize<T>;
      if (v.stride[3] == 1 && t + kSome <= p.steps && is_aligned(from, v.stride[2], kPack)) {
#pragma unroll
        for (int i = 0; i < kSome; i += kPack) {
          float pack[kPack];
          Pack<T, kPack>::load(from + i).unpack(pack);
#pragma unroll
          for (int j = 0; j < kPack; ++j) x[i + j] = pack[j];
        }
        return;
      }
#pragma unroll
      for (int j = 0; j < kSome; ++j) {
        x[j] = t + j < p.steps ? to_number(from[j * v.stride[3]]) : 0.0f;
      }
    }
  });
}

// A lane's channel in a part. Its numbers: A (state), scaled, and from `dt_weight` on dt_weight (rank).
struct PartWalk {
  const Inputs& p;
  const PartTask& task;
  int64_t dt_weight;
  const PartMemory memory{p};
  const Parameters<float> k{p, task.route, task.channel};

  __device__ __forceinline__ int to_C() const { return int(p.state) * kPartSteps; }
  __device__ __forceinline__ int numbers(int64_t first) const { return int(first * blockDim.x); }

  __device__ __forceinline__ void load_parameters() const {
    load_own(p.A, p.state, float(kLog2e), 0);
    load_own(p.dt_weight, p.rank, 1.0f, dt_weight);
  }
  __device__ __forceinline__ void load_own(const View<3>& x, int64_t count, float scale,
                                           int64_t first) const {
#pragma unroll 4
    for (int64_t i = 0; i < count; ++i) {
      memory(first + i) =
          scale * load_element<float>(
                      x.data, x.dtype,
                      task.route * x.stride[0] + task.channel * x.stride[1] + i * x.stride[2]);
    }
  }
  __device__ __forceinline__ void fill(int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) memory(first + i) = 0;
  }
  // The state that enters a part, or leaves the walk of one: (state, dim) from `states` on.
  __device__ __forceinline__ void load_states(const float* states, int64_t first) const {
#pragma unroll 4
    for (int64_t n = 0; n < p.state; ++n) memory(first + n) = task.there ? states[n * p.dim] : 0;
  }
  __device__ __forceinline__ void store_states(float* states, int64_t first) const {
    for (int64_t n = 0; n < p.state && task.there; ++n) states[n * p.dim] = memory(first + n);
  }
};

// delta with its bias, of steps from `t` of the part on; 0 at those past the end.
__device__ __forceinline__ void find_delta(const PartWalk& w, int64_t begin, int t,
                                           Numbers& delta) {
  if (w.p.rank == 0) {
    load_delta(w.p, w.task, begin + t, delta);
#pragma unroll
    for (int j = 0; j < kSome; ++j) delta[j] += w.k.bias;
    return;
  }
#pragma unroll
  for (int j = 0; j < kSome; ++j) delta[j] = w.k.bias;
  float* row = w.memory.row + t;
#pragma unroll 2
  for (int r = 0; r < int(w.p.rank); ++r, row += kPartSteps) {
    Numbers dt;
    load_numbers(row, dt);
    const float weight = w.memory(w.dt_weight + r);
#pragma unroll
    for (int j = 0; j < kSome; ++j) delta[j] += weight * dt[j];
  }
}
// delta becomes step sizes: none of steps to skip.
__device__ __forceinline__ void find_step_sizes(const Inputs& p, const Places& place,
                                                Numbers& delta) {
  if (p.delta_softplus) {
#pragma unroll
    for (int j = 0; j < kSome; ++j) delta[j] = softplus(delta[j]);
  }
  if (place.holes) {
#pragma unroll
    for (int j = 0; j < kSome; ++j) delta[j] = place.at[j] == kSkip ? 0 : delta[j];
  }
}

// Calls f(tag): whether it matters that the state starts anew. Most steps need not ask.
template <class F>
__device__ __forceinline__ void with_starts(bool starts, F&& f) {
  starts ? f(std::true_type{}) : f(std::false_type{});
}

// Calls f(n, row, own) for all states: in row B of the steps from `t` on, C in row[to_C]; in own A of
// the state, its other numbers in own[w.numbers(where they begin)].
template <class F>
__device__ __forceinline__ void for_states(const PartWalk& w, int t, F&& f) {
  float *row = w.memory.B(w.p) + t, *own = &w.memory(0);
#pragma unroll 1
  for (int n = 0; n < int(w.p.state); ++n, row += kPartSteps, own += blockDim.x) f(n, row, own);
}

// What some steps make of all states, from those in the thread's numbers from `from` on to those from
// `to` on; and of y if its outputs are wanted.
template <bool kOutputs, bool kStarts>
__device__ __forceinline__ void walk_states(const PartWalk& w, unsigned starts, int t, int64_t from,
                                            int64_t to, const Numbers& delta,
                                            const Numbers& delta_u, Numbers& y) {
  const int to_C = w.to_C(), h_from = w.numbers(from), h_to = w.numbers(to);
  for_states(w, t, [&](int, float* row, float* own) {
    const float A = *own;
    float h = own[h_from];
    Numbers B, C;
    load_numbers(row, B);
    if (kOutputs) load_numbers(row + to_C, C);
#pragma unroll
    for (int j = 0; j < kSome; ++j) {
      if (kStarts && starts >> j & 1) h = 0;
      h = selective_scan::next_state(decay(delta[j], A), h, delta_u[j], B[j]);
      if (kOutputs) y[j] += C[j] * h;
    }
    own[h_to] = h;
  });
}

}  // namespace statescan::selective_scan_2d::cuda
