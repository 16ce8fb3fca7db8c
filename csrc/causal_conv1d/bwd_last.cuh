// Backward of the short convolution for channel-last tensors. A thread walks along time over a piece
// of its channels, computes dpre of every output again, adds its terms to the sums of dweight and
// dbias, and gives dx from the last `width` values of dpre, which are in registers:
//
//   outputs    ..  right  |  begin ... end - 1        |  left  ..     dpre again, not in the sums
//   dx                       begin ... end - 1
//
// A piece that several sequences have part in is as many walks.
#pragma once

#include "causal_conv1d/bwd_one.cuh"
#include "common/divisor.h"

namespace statescan::causal_conv1d::cuda {

constexpr int kRows = 4;  // of x and of dy, loaded together

// The run that holds token t: its end is found as far as `stop`, its begin as far back as `reach`.
// Padding has slot -1.
__device__ __forceinline__ Run segment_at(const Sequences& s, int64_t b, int64_t t, int64_t stop,
                                          int64_t reach) {
  if (!s.ids) return run_at(s, b, t, 0, false);
  const int64_t id = s.ids.at(b, t);
  int64_t begin = t, end = t + 1;
  while (begin > 0 && t - begin < reach && s.ids.at(b, begin - 1) == id) --begin;
  while (end < s.seqlen && end < stop && s.ids.at(b, end) == id) ++end;
  return {begin, end, id < 0 ? -1 : b};
}

// Where a walk may go, in time steps from the first of them, `origin`.
struct Bounds {
  int64_t origin;
  int begin, end;          // the walk's own outputs and inputs
  int run_begin, run_end;  // inputs outside are zero
  int out_begin, out_end;  // outputs outside give nothing
  int dx_begin, dx_end;    // of dx, what the walk writes

  __device__ __forceinline__ Bounds(const BwdParams& p, int64_t b, const Run& run, int64_t first,
                                    int64_t stop)
      : origin(first), begin(0), end(int(stop - first)) {
    const int64_t far = end + 4 * p.width;  // beyond what a walk sees
    auto near = [&](int64_t t) { return int(clamp(t - first, -far, far)); };
    run_begin = near(run.begin), run_end = near(run.end);
    out_begin = run_begin, out_end = run_end;
    dx_begin = begin, dx_end = end;
    if (!p.initial_state && !p.dfinal_state) return;
    // Edges of other runs of this batch element do not meet this one.
    const Edges edges(p, p.sequences.offsets ? ends_of(run) : ends_of(p.sequences, b));
    auto leave_out = [&](const Interval& edge, int& from, int& to) {
      if (edge.begin >= edge.end || edge.begin >= run.end || edge.end <= run.begin) return;
      const int edge_begin = near(edge.begin), edge_end = near(edge.end);
      // An edge is all that there is on its side of the run.
      if (edge.begin <= run.begin) {
        from = from > edge_end ? from : edge_end;
      } else {
        to = to < edge_begin ? to : edge_begin;
      }
    };
    leave_out(edges.initial, out_begin, out_end);
    leave_out(edges.initial, dx_begin, dx_end);
    leave_out(edges.final, dx_begin, dx_end);
  }
};

template <class T, int kWidth, int kVec>
struct Walk {
  Taps<kWidth, kVec> taps;
  float x[kWidth][kVec];     // the inputs that the present output sees, in order of time
  float dpre[kWidth][kVec];  // of the present output and those before it, the newest last
  float sums[kWidth + 1][kVec];

  // The next output, with its newest input and the gradient of its result. Returns dx of the input that
  // no later output sees. kInside: it is one of the walk's own; otherwise, is it at all an output?
  template <bool kInside>
  __device__ __forceinline__ Pack<T, kVec> step(const Pack<T, kVec>& input,
                                                const Pack<T, kVec>& gradient, bool use_silu,
                                                bool is_output, bool counts) {
    float newest[kVec], d[kVec], dx[kVec], pre[kVec];
    input.unpack(newest);
    gradient.unpack(d);
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) x[k][c] = x[k + 1][c], dpre[k][c] = dpre[k + 1][c];
      x[kWidth - 1][c] = newest[c];
      pre[c] = taps.bias[c];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) pre[c] += taps.w[k][c] * x[k][c];
    }
    activate_vjp_all<T>(pre, use_silu, d);
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      if (!kInside && !is_output) d[c] = 0;
      dpre[kWidth - 1][c] = d[c];
      dx[c] = 0;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) dx[c] += taps.w[k][c] * dpre[kWidth - 1 - k][c];
      if (!kInside && !counts) d[c] = 0;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k][c] += d[c] * x[k][c];
      sums[kWidth][c] += d[c];
    }
    return Pack<T, kVec>::of(dx);
  }

  // All steps within `at`. x_at, dy_at and dx_at are at its origin.
  __device__ __forceinline__ void along(const BwdParams& p, const Bounds& at, const T* x_at,
                                        const T* dy_at, T* dx_at) {
    const int left = int(p.left()), right = int(p.right());
    const int64_t x_step = p.x.stride[2], dy_step = p.dy.stride[2], dx_step = p.dx.stride[2];
    auto load = [&](const T* from, int64_t step, int t) {
      return t >= at.run_begin && t < at.run_end ? Pack<T, kVec>::load(from + t * step)
                                                 : Pack<T, kVec>{};
    };
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) dpre[k][c] = 0;
      // Outputs from -right on; before that, the inputs that the first of them sees.
      if (k > 0) load(x_at, x_step, k - 1 - right - left).unpack(x[k]);
    }
#pragma unroll 1
    for (int t0 = -right; t0 < at.end + left; t0 += kRows) {
      Pack<T, kVec> rows[kRows], gradients[kRows];
      const T* x_row = x_at + (t0 + right) * x_step;
      const T* dy_row = dy_at + t0 * dy_step;
      T* dx_row = dx_at + (t0 - left) * dx_step;
      const int last = t0 + kRows - 1;
      const bool inside = t0 >= at.out_begin && t0 >= 0 && last < at.out_end && last < at.end &&
                          last + right < at.run_end && t0 - left >= at.dx_begin &&
                          last - left < at.dx_end;
      if (inside) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          rows[i] = Pack<T, kVec>::load(x_row + i * x_step);
          gradients[i] = Pack<T, kVec>::load(dy_row + i * dy_step);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          step<true>(rows[i], gradients[i], p.silu, true, true).store(dx_row + i * dx_step);
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        rows[i] = load(x_at, x_step, t0 + i + right);
        gradients[i] = load(dy_at, dy_step, t0 + i);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int t = t0 + i;
        const bool is_output = t >= at.out_begin && t < at.out_end;
        const Pack<T, kVec> dx =
            step<false>(rows[i], gradients[i], p.silu, is_output, t >= 0 && t < at.end);
        if (t - left >= at.dx_begin && t - left < at.dx_end) dx.store(dx_row + i * dx_step);
      }
    }
  }
};

// Thread: kVec channels of a piece. Grid over (batch, piece, group of channels).
template <class T, int kWidth, int kVec>
__global__ __launch_bounds__(kBwdThreads,
                             3) void channel_last_kernel(const BwdParams p, Divisor pieces,
                                                         Divisor groups, int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kBwdThreads;
  const int64_t first = int64_t(blockIdx.x) * kBwdThreads + threadIdx.x;
  for (int64_t task = first; task < tasks; task += stride) {
    int64_t group, piece;
    const int64_t part = groups.divide(task, group), b = pieces.divide(part, piece);
    const int64_t channel = group * kVec, begin = piece * p.steps;
    const int64_t end = begin + p.steps < p.seqlen ? begin + p.steps : p.seqlen;
    auto at = [&](const View<3>& v, int64_t t) {
      return static_cast<T*>(v.data) + b * v.stride[0] + t * v.stride[2] + channel;
    };
    Walk<T, kWidth, kVec> walk;
    walk.taps.load(p, channel);
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) walk.sums[k][c] = 0;
    }
#pragma unroll 1
    for (int64_t t = begin; t < end;) {
      const Run run = segment_at(p.sequences, b, t, end + kWidth - 1, kWidth - 1);
      int64_t stop = run.end < end ? run.end : end;
      if (t < run.begin || t >= stop) stop = t + 1;  // offsets that make no sense
      if (run.slot < 0 || t < run.begin || t >= run.end) {
        for (; t < stop; ++t) Pack<T, kVec>{}.store(at(p.dx, t));
        continue;
      }
      walk.along(p, Bounds(p, b, run, t, stop), at(p.x, t), at(p.dy, t), at(p.dx, t));
      t = stop;
    }
    float* sums = static_cast<float*>(p.partial) + part * (kWidth + 1) * p.dim + channel;
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) sums[k * p.dim + c] = walk.sums[k][c];
    }
  }
}

}  // namespace statescan::causal_conv1d::cuda
