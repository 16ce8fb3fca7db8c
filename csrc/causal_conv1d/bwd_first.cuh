// Backward of the short convolution for channel-first tensors. A warp walks along a piece of one
// channel, a row of 32 packs at a time:
//
//               lane 0   lane 1        lane 31
//   row r - 1   [ dpre ] [ dpre ]  ..  [ dpre ] ->  dx of row r - 1, once the first dpre of row r and
//   row r       [ dpre ] [ dpre ]  ..  [ dpre ]     the last of row r - 2 are there
//   row r + 1     x, dy    x, dy   ..              on their way from memory
//   row r + 2     x, dy    x, dy   ..
//
// Each lane computes dpre of its own pack once; what dx needs of the packs beside it comes by shuffles.
// Inputs beside a pack are loaded again, from the first-level cache. The sums of dweight and dbias stay
// in the lanes until the end of the piece. Packs at the ends of sequences see the same code with masks.
#pragma once

#include "causal_conv1d/bwd_one.cuh"
#include "causal_conv1d/packs.cuh"
#include "common/divisor.h"

namespace statescan::causal_conv1d::cuda {

constexpr int kAhead =
    2;  // rows on their way: 3 loads of 512 bytes each, for each of 20 warps of an SM
constexpr unsigned kLanes = 0xffffffffu;

// Where a pack is not in the midst of a sequence. Bit j is time t - kReach + j, the pack's own times
// being kReach .. kReach + kVec - 1.
struct Window {
  uint32_t starts = 0;     // a sequence begins here
  uint32_t no_input = 0;   // padding, or outside of the tensor
  uint32_t no_output = 0;  // nor an output, or one that sees a state
  uint32_t no_store = 0;   // outside of the tensor, or dx is edge_dx_kernel's

  __device__ __forceinline__ bool whole() const {
    return (starts | no_input | no_output | no_store) == 0;
  }

  // Are two positions, low <= high, of one sequence?
  __device__ __forceinline__ bool joined(int low, int high) const {
    return (starts >> (low + 1) & ((1u << (high - low)) - 1)) == 0;
  }
};

// `run`: some run of packed sequences, and moved on to one that the window sees.
template <int kVec, int kReach>
__device__ __forceinline__ Window window_at(const BwdParams& p, int64_t b, int64_t t, Run& run) {
  const Sequences& s = p.sequences;
  const int64_t from = t - kReach, to = t + kVec + kReach;
  Window w;
  if (from >= 0 && to <= s.seqlen) {
    if (s.ids ? in_one_run(s, b, from, to) : from >= run.begin && to <= run.end) return w;
  }
  int64_t before = -1;
#pragma unroll 1
  for (int j = 0; j < kVec + 2 * kReach; ++j) {
    const int64_t at = from + j;
    const uint32_t bit = 1u << j;
    if (at < 0 || at >= s.seqlen) {
      w.no_input |= bit, w.no_output |= bit, w.no_store |= bit;
      continue;
    }
    if (s.ids) {
      const int64_t id = s.ids.at(b, at);
      if (id != before) w.starts |= bit;
      if (id < 0) w.no_input |= bit, w.no_output |= bit;
      before = id;
    } else if (s.offsets) {
      if (at < run.begin || at >= run.end) run = run_at(s, b, at, 0, false);
      if (at == run.begin) w.starts |= bit;
    }
    const Edges edges(p, s.offsets ? ends_of(run) : ends_of(s, b));
    if (edges.initial.holds(at)) w.no_output |= bit, w.no_store |= bit;
    if (edges.final.holds(at)) w.no_store |= bit;
  }
  return w;
}

// A lane's share of a row.
template <class T, int kWidth, int kLeft>
struct RowPart {
  static constexpr int kVec = kPackSize<T>, kReach = kWidth - 1, kRight = kReach - kLeft;

  // dpre of the pack's outputs, and their terms of the sums if the row `counts`.
  template <bool kMasked>
  static __device__ __forceinline__ void outputs(const Neighbours<T, kLeft, kRight>& x,
                                                 const Pack<T, kVec>& gradient, const Window& w,
                                                 const Taps<kWidth, 1>& taps, bool use_silu,
                                                 bool counts, float (&dpre)[kVec],
                                                 float (&sums)[kWidth + 1]) {
    float in[kVec + kReach], dy[kVec];
    x.unpack(in);
    gradient.unpack(dy);
#pragma unroll
    for (int i = 0; kMasked && i < kVec + kReach; ++i) {
      if (w.no_input >> (i + kRight) & 1) in[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      auto seen = [&](int k) {
        const int own = i + kReach, other = i + k + kRight;
        const bool joined = !kMasked || (own < other ? w.joined(own, other) : w.joined(other, own));
        return joined ? in[i + k] : 0.0f;
      };
      float pre = taps.bias[0];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) pre += taps.w[k][0] * seen(k);
      float d = activate_vjp(pre, dy[i], use_silu);
      if (kMasked && (w.no_output >> (i + kReach) & 1)) d = 0;
      dpre[i] = d;
      if (!counts) d = 0;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k] += d * seen(k);
      sums[kWidth] += d;
    }
  }

  // dx of the pack; dpre[i] is that of time t - kRight + i.
  template <bool kMasked>
  static __device__ __forceinline__ void inputs(const float (&dpre)[kVec + kReach], const Window& w,
                                                const Taps<kWidth, 1>& taps, float (&dx)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      dx[i] = 0;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int own = i + kReach, other = own + kLeft - k;
        const bool joined = !kMasked || (own < other ? w.joined(own, other) : w.joined(other, own));
        if (joined) dx[i] += taps.w[k][0] * dpre[i + kReach - k];
      }
    }
  }

  static __device__ __forceinline__ void store(T* row, int64_t t, bool aligned, const Window& w,
                                               const float (&dx)[kVec]) {
    if (aligned && (w.no_store >> kReach & ((1u << kVec) - 1)) == 0) {
      Pack<T, kVec>::of(dx).store(row + t);
      return;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (!(w.no_store >> (i + kReach) & 1)) row[t + i] = from_number<T>(dx[i]);
    }
  }
};

// Warp: a piece of `rows` rows of one channel, of `all_rows`. Grid over (batch, piece, channel).
template <class T, int kWidth, int kLeft>
__global__ __launch_bounds__(kBwdThreads, 4) void channel_first_kernel(const BwdParams p,
                                                                       Divisor pieces, Divisor dim,
                                                                       int64_t tasks) {
  using Part = RowPart<T, kWidth, kLeft>;
  constexpr int kVec = Part::kVec, kReach = Part::kReach, kRight = Part::kRight;
  constexpr int kRow = 32 * kVec;
  const int lane = int(threadIdx.x % 32);
  const int64_t stride = int64_t(gridDim.x) * (kBwdThreads / 32);
  const int64_t first_task = int64_t(blockIdx.x) * (kBwdThreads / 32) + threadIdx.x / 32;
  for (int64_t task = first_task; task < tasks; task += stride) {
    int64_t c, piece;
    const int64_t part = dim.divide(task, c), b = pieces.divide(part, piece);
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c * p.x.stride[1];
    const T* dy = static_cast<const T*>(p.dy.data) + b * p.dy.stride[0] + c * p.dy.stride[1];
    T* dx = static_cast<T*>(p.dx.data) + b * p.dx.stride[0] + c * p.dx.stride[1];
    const int64_t off = misalignment(x);
    const bool aligned = off == misalignment(dy) && off == misalignment<T>(dx);
    const int64_t begin = piece * p.steps, end = begin + p.steps;  // rows begin at begin - off ..
    const int64_t last = p.seqlen + off;  // .. and there are some up to here
    const int64_t stop = end < last ? end : last;

    // Before and after the piece, only the lane next to it has something to do.
    auto time = [&](int64_t at) { return at - off + lane * kVec; };
    auto takes_part = [&](int64_t at) {
      if (at < begin) return kRight > 0 && at >= 0 && lane == 31;
      if (at >= end) return kLeft > 0 && at < last && lane == 0;
      return at < stop && time(at) < p.seqlen;
    };
    Neighbours<T, kLeft, kRight> x_ahead[kAhead];
    Pack<T, kVec> dy_ahead[kAhead];
    auto load = [&](int i, int64_t at) {
      const bool some = takes_part(at);
      x_ahead[i].load(x, time(at), some ? p.seqlen : 0, aligned);
      dy_ahead[i] = load_pack(dy, time(at), some ? p.seqlen : 0, aligned);
    };

    Run run = p.sequences.offsets ? Run{} : Run{0, p.seqlen, b};
    Taps<kWidth, 1> taps;
    taps.load(p, c);
    float sums[kWidth + 1] = {};
    // Of the row before the one that the loop is at, and around it.
    float dpre_before[kVec] = {}, left_of[kReach + 1] = {}, right_of[kReach + 1] = {};
    Window window_before;
    window_before.no_store = ~0u;
    const int64_t first = kRight > 0 && begin > 0 ? begin - kRow : begin;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i, first + i * kRow);

#pragma unroll 1
    for (int64_t at = first; at < stop + kRow; at += kRow) {
      const Neighbours<T, kLeft, kRight> x_own = x_ahead[0];
      const Pack<T, kVec> dy_own = dy_ahead[0];
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i)
        x_ahead[i] = x_ahead[i + 1], dy_ahead[i] = dy_ahead[i + 1];
      load(kAhead - 1, at + kAhead * kRow);

      float dpre[kVec] = {};
      Window window;
      if (takes_part(at)) {
        const bool counts = at >= begin && at < end;
        window = window_at<kVec, kReach>(p, b, time(at), run);
        if (window.whole()) {
          Part::template outputs<false>(x_own, dy_own, window, taps, p.silu, counts, dpre, sums);
        } else {
          Part::template outputs<true>(x_own, dy_own, window, taps, p.silu, counts, dpre, sums);
        }
        if (!counts) window.no_store = ~0u;
      } else {
        window.no_store = ~0u;
      }
      __syncwarp();

      // dpre around the pack of the row before: first what is now known on its right.
      float around[kVec + kReach], dx_before[kVec];
#pragma unroll
      for (int i = 0; i < kLeft; ++i) {
        const float next = __shfl_sync(kLanes, dpre[i], (lane + 1) % 32);
        around[kRight + kVec + i] = lane == 31 ? next : right_of[i];
        right_of[i] = next;
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) around[kRight + i] = dpre_before[i];
#pragma unroll
      for (int i = 0; i < kRight; ++i) {
        around[i] = left_of[i];
        const float next = __shfl_sync(kLanes, dpre_before[kVec - kRight + i], (lane + 31) % 32);
        const float own = __shfl_sync(kLanes, dpre[kVec - kRight + i], (lane + 31) % 32);
        left_of[i] = lane == 0 ? next : own;
      }
      if ((window_before.no_store >> kReach & ((1u << kVec) - 1)) != (1u << kVec) - 1) {
        if (window_before.starts == 0) {
          Part::template inputs<false>(around, window_before, taps, dx_before);
        } else {
          Part::template inputs<true>(around, window_before, taps, dx_before);
        }
        Part::store(dx, time(at - kRow), aligned, window_before, dx_before);
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) dpre_before[i] = dpre[i];
      window_before = window;
      __syncwarp();
    }

    float* partial = static_cast<float*>(p.partial) + part * (kWidth + 1) * p.dim + c;
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        sums[k] += __shfl_xor_sync(kLanes, sums[k], lanes);
      }
      if (lane == 0) partial[k * p.dim] = sums[k];
    }
  }
}

}  // namespace statescan::causal_conv1d::cuda
