// Forward of the short convolution on the GPU. Bound by memory: no shared memory, no barriers, 16
// bytes at a time, every input read once from memory (and a few from cache once more, at the seams).
//
//   channel-last                              channel-first
//
//   t   thread i: channels 8i .. 8i + 7       c    thread i: steps 8i .. 8i + 7 of a row
//   |   ┌──────┬──────┬──────┬─ ..            |    ┌──────┬──────┬──────┬─ .. t
//   |   │ walk │      │      │                |    │ pack │ pack │ pack │
//   v   │  │   │      │      │                v    ├──────┼──────┼──────┼─ ..
//       │  v   │      │      │                     │      │      │      │
//
// Outputs that see padding, another sequence, or less than a whole pack go one by one
// (padded_output); so does everything of mixed or double type, any other strides, and other widths.
// Grids are one-dimensional and strided over, offsets have 64 bits: no size is too large.
#include "causal_conv1d/packs.cuh"
#include "causal_conv1d/padded.cuh"

#include "common/divisor.h"
#include "common/launch.h"

namespace statescan::causal_conv1d::cuda {
namespace {

constexpr int kThreads = 128;

// ---- channel-last

constexpr int kRows = 8;    // loaded together: 8 x 16 bytes of each thread are on their way
constexpr int kSteps = 64;  // of a thread: the width - 1 rows before them are 5 % more to read

// kCount outputs of kVec channels from time t on. `seen` is the kWidth - 1 inputs before the newest
// that the first of them sees, and is moved on.
template <int kCount, class T, int kWidth, int kVec>
__device__ __forceinline__ void filter_rows(const T* x, int64_t x_step, T* y, int64_t y_step,
                                            const Taps<kWidth, kVec>& taps, bool silu,
                                            float (&seen)[kWidth - 1][kVec]) {
  Pack<T, kVec> row[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) row[i] = Pack<T, kVec>::load(x + i * x_step);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float newest[kVec], sum[kVec];
    row[i].unpack(newest);
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      sum[c] = taps.bias[c];
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) sum[c] += taps.w[k][c] * seen[k][c];
      sum[c] += taps.w[kWidth - 1][c] * newest[c];
#pragma unroll
      for (int k = 0; k < kWidth - 2; ++k) seen[k][c] = seen[k + 1][c];
      seen[kWidth - 2][c] = newest[c];
    }
    activate_all<T>(sum, silu);
    Pack<T, kVec>::of(sum).store(y + i * y_step);
  }
}

// Thread: kVec channels, kSteps time steps. Grid over (batch, piece, group of channels).
template <class T, int kWidth, int kVec>
__global__ __launch_bounds__(kThreads, 3) void channel_last_kernel(const FwdParams p,
                                                                   Divisor pieces, Divisor groups,
                                                                   int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t group, piece;
    const int64_t b = pieces.divide(groups.divide(task, group), piece);
    const int64_t channel = group * kVec, begin = piece * kSteps;
    const int64_t end = begin + kSteps < p.seqlen ? begin + kSteps : p.seqlen;
    const int64_t channels = p.dim - channel < kVec ? p.dim - channel : kVec;
    if (channels < kVec || !in_one_run(p.sequences, b, begin - p.left(), end + p.right())) {
#pragma unroll 1
      for (int64_t t = begin; t < end; ++t) {
#pragma unroll 1
        for (int64_t c = 0; c < channels; ++c) padded_output<float>(p, b, channel + c, t);
      }
      continue;
    }
    const int64_t x_step = p.x.stride[2], y_step = p.y.stride[2];
    const T* x =
        static_cast<const T*>(p.x.data) + b * p.x.stride[0] + channel + (begin - p.left()) * x_step;
    T* y = static_cast<T*>(p.y.data) + b * p.y.stride[0] + channel + begin * y_step;
    Taps<kWidth, kVec> taps;
    taps.load(p, channel);
    float seen[kWidth - 1][kVec];
#pragma unroll
    for (int k = 0; k < kWidth - 1; ++k) {
      Pack<T, kVec>::load(x).unpack(seen[k]);
      x += x_step;
    }
    int64_t t = begin;
    for (; t + kRows <= end; t += kRows, x += kRows * x_step, y += kRows * y_step) {
      filter_rows<kRows>(x, x_step, y, y_step, taps, p.silu, seen);
    }
    for (; t < end; ++t, x += x_step, y += y_step) {
      filter_rows<1>(x, x_step, y, y_step, taps, p.silu, seen);
    }
  }
}

// ---- channel-first

constexpr int kPacks = 4;  // of a lane, 32 lanes apart, loaded together

// The outputs of one pack.
template <class T, int kWidth>
__device__ __forceinline__ Pack<T, kPackSize<T>> filter_pack(const FwdParams& p,
                                                             const Neighbours<T>& x,
                                                             const Taps<kWidth, 1>& taps) {
  constexpr int kVec = kPackSize<T>;
  float in[kVec + kWidth - 1], y[kVec];
  if (p.mode == Mode::kCausal) {
    x.template unpack<kWidth - 1>(in);
  } else if (p.mode == Mode::kAnticausal) {
    x.template unpack<0>(in);
  } else {
    x.template unpack<(kWidth - 1) / 2>(in);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    y[i] = taps.bias[0];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[i] += taps.w[k][0] * in[i + k];
  }
  activate_all<T>(y, p.silu);
  return Pack<T, kVec>::of(y);
}

// Warp: kPacks packs of each lane, of one channel. Packs are counted from the aligned address at or
// before the row, so that rows of any length are read in aligned packs. Grid over (batch, channel,
// strip of a warp).
template <class T, int kWidth>
__global__ __launch_bounds__(kThreads, 4) void channel_first_kernel(const FwdParams p,
                                                                    Divisor strips, Divisor dim,
                                                                    int64_t tasks) {
  constexpr int kVec = kPackSize<T>;
  const int64_t stride = int64_t(gridDim.x) * (kThreads / 32);
  const int64_t first = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  for (int64_t task = first; task < tasks; task += stride) {
    int64_t strip, c;
    const int64_t b = dim.divide(strips.divide(task, strip), c);
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c * p.x.stride[1];
    T* y = static_cast<T*>(p.y.data) + b * p.y.stride[0] + c * p.y.stride[1];
    const bool aligned = misalignment(x) == misalignment<T>(y);
    const int64_t t0 = (strip * (32 * kPacks) + threadIdx.x % 32) * kVec - misalignment(x);
    auto time = [&](int i) { return t0 + i * 32 * kVec; };

    Neighbours<T> in[kPacks];
    unsigned whole = 0;  // the packs with all of their inputs
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t t = time(i), end = t + kVec;
      const bool with_before = p.left() > 0, with_after = p.right() > 0;
      if (aligned && t >= (with_before ? kVec : 0) && end + (with_after ? kVec : 0) <= p.seqlen &&
          in_one_run(p.sequences, b, t - p.left(), end + p.right())) {
        whole |= 1u << i;
        in[i].load_whole(x + t, with_before, with_after);
      }
    }
    Taps<kWidth, 1> taps;
    taps.load(p, c);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (whole >> i & 1) filter_pack(p, in[i], taps).store(y + time(i));
    }
#pragma unroll 1
    for (int i = 0; i < kPacks * kVec; ++i) {  // the rest, step by step
      const int64_t t = time(i / kVec) + i % kVec;
      if (!(whole >> (i / kVec) & 1) && t >= 0 && t < p.seqlen) padded_output<float>(p, b, c, t);
    }
  }
}

// ---- anything else

// Thread: one output. Neighbouring threads have neighbouring channels or steps, whichever lie
// closer in memory.
template <class R>
__global__ __launch_bounds__(kThreads) void any_kernel(const FwdParams p, Divisor inner,
                                                       Divisor outer, bool channels_inside,
                                                       int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t i, j;
    const int64_t b = outer.divide(inner.divide(task, i), j);
    padded_output<R>(p, b, channels_inside ? i : j, channels_inside ? j : i);
  }
}

// The run whose end a slot's final state is.
__device__ __forceinline__ Run final_run(const Sequences& s, int64_t slot, bool last_first) {
  if (s.offsets) return packed_run(s, slot);
  if (!s.ids) return {0, s.seqlen, slot};
  const RunEnds ends = s.ends[slot];
  if (last_first) return {ends.begin, ends.first_end, ends.first_end == ends.end ? slot : -1};
  return {ends.last_begin, ends.end, ends.last_begin == ends.begin ? slot : -1};
}

// Thread: one element of a final state: the last width - 1 positions of the padded run, or the first
// ones.
template <class R>
__global__ __launch_bounds__(kThreads) void final_state_kernel(const FwdParams p, Divisor length,
                                                               Divisor dim, int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  const bool last_first = p.mode == Mode::kAnticausal;
  const View<3>& state = p.final_state;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t i, c;
    const int64_t slot = dim.divide(length.divide(task, i), c);
    const Run run = final_run(p.sequences, slot, last_first);
    const int64_t t = last_first ? run.begin + i : run.end - (p.width - 1) + i;
    const int64_t b = p.sequences.offsets ? 0 : slot;
    store_element(state.data, state.dtype,
                  slot * state.stride[0] + c * state.stride[1] + i * state.stride[2],
                  padded_input<R>(p, run, b, c, t));
  }
}

// ---- launches

template <class T, int kWidth, int kVec>
void launch_channel_last(const FwdParams& p, cudaStream_t stream) {
  const int64_t pieces = (p.seqlen + kSteps - 1) / kSteps, groups = (p.dim + kVec - 1) / kVec;
  const int64_t tasks = p.batch * pieces * groups;
  launch("causal_conv1d fwd, channel-last", channel_last_kernel<T, kWidth, kVec>,
         blocks_for(tasks, kThreads), kThreads, 0, stream, p, Divisor(pieces), Divisor(groups),
         tasks);
}

template <class T, int kWidth>
void launch_fast(const FwdParams& p, cudaStream_t stream) {
  constexpr int kVec = kPackSize<T>;
  if (p.x.stride[1] != 1 || p.y.stride[1] != 1) {
    constexpr int64_t kStrip = 32 * kPacks * kVec;
    const int64_t strips = (p.seqlen + kVec - 1 + kStrip - 1) / kStrip;
    const int64_t tasks = p.batch * p.dim * strips;
    launch("causal_conv1d fwd, channel-first", channel_first_kernel<T, kWidth>,
           blocks_for(tasks, kThreads / 32), kThreads, 0, stream, p, Divisor(strips),
           Divisor(p.dim), tasks);
  } else if (starts_aligned(p.x, kVec) && starts_aligned(p.y, kVec)) {
    launch_channel_last<T, kWidth, kVec>(p, stream);
  } else {
    launch_channel_last<T, kWidth, 1>(p, stream);
  }
}

void launch_any(const FwdParams& p, cudaStream_t stream) {
  const bool channels_inside = p.x.stride[1] <= p.x.stride[2];
  const int64_t tasks = p.batch * p.dim * p.seqlen;
  launch("causal_conv1d fwd, any layout",
         p.compute == DType::kFloat64 ? any_kernel<double> : any_kernel<float>,
         blocks_for(tasks, kThreads), kThreads, 0, stream, p,
         Divisor(channels_inside ? p.dim : p.seqlen), Divisor(channels_inside ? p.seqlen : p.dim),
         channels_inside, tasks);
}

void launch_final_state(const FwdParams& p, cudaStream_t stream) {
  const int64_t tasks = p.sequences.slots() * p.dim * (p.width - 1);
  if (tasks == 0) return;
  launch("causal_conv1d fwd, final state",
         p.compute == DType::kFloat64 ? final_state_kernel<double> : final_state_kernel<float>,
         blocks_for(tasks, kThreads), kThreads, 0, stream, p, Divisor(p.width - 1), Divisor(p.dim),
         tasks);
}

bool is_fast(const FwdParams& p) {
  const bool channel_last = p.x.stride[1] == 1 && p.y.stride[1] == 1;
  const bool channel_first = p.x.stride[2] == 1 && p.y.stride[2] == 1;
  return p.compute == DType::kFloat32 && p.x.dtype == p.y.dtype && p.width >= 2 && p.width <= 4 &&
         (channel_last || channel_first);
}

}  // namespace

void fwd(const FwdParams& p, cudaStream_t stream) {
  if (p.sequences.ends != nullptr) find_run_ends(p.sequences, stream);
  if (p.batch * p.dim * p.seqlen > 0) {
    if (is_fast(p)) {
      with_fast_type(p.x.dtype, [&](auto* type) {
        with_fast_width(p.width, [&](auto width) {
          launch_fast<std::remove_pointer_t<decltype(type)>, width()>(p, stream);
        });
      });
    } else {
      launch_any(p, stream);
    }
  }
  if (p.final_state) launch_final_state(p, stream);
}

}  // namespace statescan::causal_conv1d::cuda
