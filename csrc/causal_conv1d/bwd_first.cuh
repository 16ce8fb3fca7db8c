// Backward of the short convolution for channel-first tensors. A warp walks along a piece of one
// channel, a row of 32 packs at a time:
//
//               lane 0   lane 1        lane 31
//   row r - 1   [ dpre ] [ dpre ]  ..  [ dpre ] ->  dx of row r - 1, once the first dpre of row r and
//   row r       [ dpre ] [ dpre ]  ..  [ dpre ]     the last of row r - 2 are there
//
// Each lane computes dpre of its own pack once; what dx needs of the packs beside it comes by shuffles.
// Inputs beside a pack are loaded again, from the first-level cache. The sums of dweight and dbias stay
// in the lanes until the end of the piece. Rows that are not in the midst of a sequence go one by one,
// with masks.
#pragma once

#include "causal_conv1d/bwd_one.cuh"
#include "causal_conv1d/packs.cuh"
#include "common/divisor.h"
#include "common/lanes.cuh"

namespace statescan::causal_conv1d::cuda {

constexpr int kGroup = 2;  // rows loaded together: 2 KiB of each warp are on their way

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

  // Is dx of any of `count` positions from `first` on to be stored?
  __device__ __forceinline__ bool stores(int first, int count) const {
    const uint32_t own = ((1u << count) - 1) << first;
    return (no_store & own) != own;
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

  // dpre of the pack's outputs, and their terms of the sums if the row `counts` (what is not masked does).
  template <bool kMasked>
  static __device__ __forceinline__ void outputs(const Neighbours<T>& x,
                                                 const Pack<T, kVec>& gradient, const Window& w,
                                                 const Taps<kWidth, 1>& taps, bool use_silu,
                                                 bool counts, float (&dpre)[kVec],
                                                 float (&sums)[kWidth + 1]) {
    float in[kVec + kReach];
    x.template unpack<kLeft>(in);
    gradient.unpack(dpre);
#pragma unroll
    for (int i = 0; kMasked && i < kVec + kReach; ++i) {
      if (w.no_input >> (i + kRight) & 1) in[i] = 0;
    }
    // The input under tap k of output i.
    auto seen = [&](int i, int k) {
      const int own = i + kReach, other = i + k + kRight;
      const bool joined = !kMasked || (own < other ? w.joined(own, other) : w.joined(other, own));
      return joined ? in[i + k] : 0.0f;
    };
    float pre[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      pre[i] = taps.bias[0];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) pre[i] += taps.w[k][0] * seen(i, k);
    }
    activate_vjp_all<T>(pre, use_silu, dpre);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (kMasked && (w.no_output >> (i + kReach) & 1)) dpre[i] = 0;
      const float d = kMasked && !counts ? 0.0f : dpre[i];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k] += d * seen(i, k);
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

// A warp's walk: what a lane knows of the row before the one that the walk is at.
template <class T, int kWidth, int kLeft>
struct RowWalk {
  using Part = RowPart<T, kWidth, kLeft>;
  static constexpr int kVec = Part::kVec, kReach = Part::kReach, kRight = Part::kRight;

  const int lane;
  T* const dx;
  const int64_t off;
  const bool aligned;
  Taps<kWidth, 1> taps;
  float sums[kWidth + 1] = {};
  float dpre[kVec] = {};                                      // of the row before
  float left_of[kReach + 1] = {}, right_of[kReach + 1] = {};  // dpre beside it
  Window window;                                              // of the row before

  __device__ __forceinline__ RowWalk(T* dx_row, int64_t misaligned, bool all_aligned)
      : lane(int(threadIdx.x % 32)), dx(dx_row), off(misaligned), aligned(all_aligned) {
    window.no_store = ~0u;
  }

  __device__ __forceinline__ int64_t time(int64_t at) const { return at - off + lane * kVec; }

  // With the dpre of the row at `at` known: dx of the row before. kWhole: that is known to be whole.
  template <bool kWhole>
  __device__ __forceinline__ void move_to(int64_t at, const float (&next)[kVec],
                                          const Window& next_window) {
    float around[kVec + kReach], dx_before[kVec];
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const float right = __shfl_sync(kAllLanes, next[i], (lane + 1) % 32);
      around[kRight + kVec + i] = lane == 31 ? right : right_of[i];
      right_of[i] = right;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) around[kRight + i] = dpre[i];
#pragma unroll
    for (int i = 0; i < kRight; ++i) {
      around[i] = left_of[i];
      const float before = __shfl_sync(kAllLanes, dpre[kVec - kRight + i], (lane + 31) % 32);
      const float own = __shfl_sync(kAllLanes, next[kVec - kRight + i], (lane + 31) % 32);
      left_of[i] = lane == 0 ? before : own;
    }
    if (kWhole || window.whole()) {
      Part::template inputs<false>(around, window, taps, dx_before);
      if (kWhole || aligned) {
        Pack<T, kVec>::of(dx_before).store(dx + time(at - 32 * kVec));
      } else {
        Part::store(dx, time(at - 32 * kVec), aligned, window, dx_before);
      }
    } else if (window.stores(kReach, kVec)) {
      Part::template inputs<true>(around, window, taps, dx_before);
      Part::store(dx, time(at - 32 * kVec), aligned, window, dx_before);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kVec; ++i) dpre[i] = next[i];
    window = next_window;
  }
};

// Are kGroup rows from `at` on, and what is within reach of them, in the midst of one sequence?
template <int kVec, int kReach>
__device__ __forceinline__ bool rows_are_whole(const Sequences& s, int64_t b, int64_t from,
                                               int64_t own, Run& run) {
  constexpr int64_t kSteps = 32 * kVec * kGroup;
  if (from < kVec || from + kSteps + kVec > s.seqlen) return false;
  if (s.ids) {
    bool whole = true;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int64_t t = own + i * 32 * kVec;
      whole = whole && in_one_run(s, b, t - kReach, t + kVec + kReach);
    }
    return __all_sync(kAllLanes, whole);
  }
  if (!s.offsets) return true;
  if (from < run.begin || from >= run.end) run = run_at(s, b, from, 0, false);
  // Where offsets make no sense runs overlap, and lanes may have different ones.
  return __all_sync(kAllLanes, from - kReach >= run.begin && from + kSteps + kReach <= run.end);
}

// Warp: a piece of one channel, p.steps long. Grid over (batch, piece, channel).
template <class T, int kWidth, int kLeft>
__global__ __launch_bounds__(kBwdThreads, 4) void channel_first_kernel(const BwdParams p,
                                                                       Divisor pieces, Divisor dim,
                                                                       int64_t tasks) {
  using Walk = RowWalk<T, kWidth, kLeft>;
  using Part = typename Walk::Part;
  constexpr int kVec = Part::kVec, kReach = Part::kReach, kRight = Part::kRight;
  constexpr int kRow = 32 * kVec;
  const int64_t stride = int64_t(gridDim.x) * (kBwdThreads / 32);
  const int64_t first_task = int64_t(blockIdx.x) * (kBwdThreads / 32) + threadIdx.x / 32;
  for (int64_t task = first_task; task < tasks; task += stride) {
    int64_t c, piece;
    const int64_t part = dim.divide(task, c), b = pieces.divide(part, piece);
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c * p.x.stride[1];
    const T* dy = static_cast<const T*>(p.dy.data) + b * p.dy.stride[0] + c * p.dy.stride[1];
    T* dx = static_cast<T*>(p.dx.data) + b * p.dx.stride[0] + c * p.dx.stride[1];
    const int64_t off = misalignment(x);
    Walk walk(dx, off, off == misalignment(dy) && off == misalignment<T>(dx));
    walk.taps.load(p, c);
    const int64_t begin = piece * p.steps, end = begin + p.steps;  // rows begin at begin - off ..
    const int64_t last = p.seqlen + off;  // .. and there are some up to here
    const int64_t stop = end < last ? end : last;

    // Before and after the piece, only the lane next to it has something to do.
    auto takes_part = [&](int64_t at) {
      if (at < begin) return kRight > 0 && walk.lane == 31;
      if (at >= end) return kLeft > 0 && at < last && walk.lane == 0;
      return at < stop && walk.time(at) < p.seqlen;
    };
    Run run = p.sequences.offsets ? Run{} : Run{0, p.seqlen, b};
    int64_t at = kRight > 0 && begin > 0 ? begin - kRow : begin;
#pragma unroll 1
    while (at < stop + kRow) {
      if (walk.aligned && at >= begin && at + kGroup * kRow <= stop &&
          rows_are_whole<kVec, kReach>(p.sequences, b, at - off, walk.time(at), run)) {
        Neighbours<T> inputs[kGroup];
        Pack<T, kVec> gradients[kGroup];
        const T* x_own = x + walk.time(at);
        const T* dy_own = dy + walk.time(at);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          inputs[i].load_whole(x_own + i * kRow, kLeft > 0, kRight > 0);
          gradients[i] = Pack<T, kVec>::load(dy_own + i * kRow);
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          float dpre[kVec];
          Part::template outputs<false>(inputs[i], gradients[i], Window{}, walk.taps, p.silu, true,
                                        dpre, walk.sums);
          if (i == 0) {
            walk.template move_to<false>(at, dpre, Window{});
          } else {
            walk.template move_to<true>(at + i * kRow, dpre, Window{});
          }
        }
        at += kGroup * kRow;
        continue;
      }
      float dpre[kVec] = {};
      Window window;
      if (takes_part(at)) {
        const int64_t t = walk.time(at);
        const bool counts = at >= begin && at < end;
        Neighbours<T> inputs;
        inputs.load(x, t, p.seqlen, walk.aligned, kLeft > 0, kRight > 0);
        const Pack<T, kVec> gradient = load_pack(dy, t, p.seqlen, walk.aligned);
        window = window_at<kVec, kReach>(p, b, t, run);
        Part::template outputs<true>(inputs, gradient, window, walk.taps, p.silu, counts, dpre,
                                     walk.sums);
        if (!counts) window.no_store = ~0u;
      } else {
        window.no_store = ~0u;
      }
      __syncwarp();
      walk.template move_to<false>(at, dpre, window);
      at += kRow;
    }

    float* partial = static_cast<float*>(p.partial) + part * (kWidth + 1) * p.dim + c;
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
      const float sum = sum_over_warp(walk.sums[k]);
      if (walk.lane == 0) partial[k * p.dim] = sum;
    }
  }
}

}  // namespace statescan::causal_conv1d::cuda
