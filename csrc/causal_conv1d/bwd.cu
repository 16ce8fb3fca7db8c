// Backward of the short convolution on the GPU, from nothing but the inputs: each thread walks along
// time over a piece of its channels, computes dpre of every output again, adds it to its sums of
// dweight and dbias, and gives dx from the last `width` values of dpre, which are in registers.
//
//   outputs    ..  right  |  begin ... end - 1        |  left  ..     dpre again, not in the sums
//   dx                       begin ... end - 1
//
// The sums of a piece are a row of `partial`; the rows are added up in their order by a second
// kernel, so the gradients are deterministic. Tensors of mixed or double type, other strides or
// widths, and pieces that a state reaches into, go one number at a time.
#include "causal_conv1d/padded.cuh"

#include "common/divisor.h"
#include "common/launch.h"

namespace statescan::causal_conv1d::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 4;  // of x and of dy, loaded together

// ---- one number at a time

// The gradient of what is before the activation, at time t; 0 outside of the run.
template <class R>
__device__ __forceinline__ R padded_dpre(const BwdParams& p, const Run& run, int64_t b, int64_t c,
                                         int64_t t) {
  if (!p.dy || t < run.begin || t >= run.end) return R(0);
  const R dy = load_element<R>(p.dy.data, p.dy.dtype,
                               b * p.dy.stride[0] + c * p.dy.stride[1] + t * p.dy.stride[2]);
  return activate_vjp(padded_pre<R>(p, run, b, c, t), dy, p.silu);
}

// The gradient of the input at time t of a padded run.
template <class R>
__device__ __forceinline__ R padded_dx(const BwdParams& p, const Run& run, int64_t b, int64_t c,
                                       int64_t t) {
  R dx = 0;
#pragma unroll 1
  for (int64_t k = 0; k < p.width; ++k) {
    dx += load_tap<R>(p, c, k) * padded_dpre<R>(p, run, b, c, t + p.left() - k);
  }
  const View<3>& state = p.dfinal_state;
  const bool last_first = p.mode == Mode::kAnticausal;
  const int64_t slot = state ? final_slot(p.sequences, run, b, last_first) : -1;
  const int64_t i = t - (last_first ? run.begin : run.end - (p.width - 1));
  if (slot < 0 || i < 0 || i >= p.width - 1) return dx;
  return dx + load_element<R>(state.data, state.dtype,
                              slot * state.stride[0] + c * state.stride[1] + i * state.stride[2]);
}

// Everything of one channel of a piece. `sums` is its column of `partial`.
template <class R>
__device__ __forceinline__ void padded_piece(const BwdParams& p, int64_t b, int64_t c,
                                             int64_t begin, int64_t end, R* sums) {
  for (int64_t k = 0; k <= p.width; ++k) sums[k * p.dim] = 0;
#pragma unroll 1
  for (int64_t t = begin; t < end; ++t) {
    const Run run = run_at(p.sequences, b, t, 2 * (p.width - 1), p.mode == Mode::kAnticausal);
    const bool padding = run.begin == run.end;
    store_element(p.dx.data, p.dx.dtype,
                  b * p.dx.stride[0] + c * p.dx.stride[1] + t * p.dx.stride[2],
                  padding ? R(0) : padded_dx<R>(p, run, b, c, t));
    if (padding) continue;
    const R dpre = padded_dpre<R>(p, run, b, c, t);
#pragma unroll 1
    for (int64_t k = 0; k < p.width; ++k) {
      sums[k * p.dim] += dpre * padded_input<R>(p, run, b, c, t + k - p.left());
    }
    sums[p.width * p.dim] += dpre;
  }
}

// Thread: a channel of a piece. Grid over (batch, piece, channel).
template <class R>
__global__ __launch_bounds__(kThreads) void any_kernel(const BwdParams p, Divisor pieces,
                                                       Divisor dim, int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t c, piece;
    const int64_t part = dim.divide(task, c), b = pieces.divide(part, piece);
    const int64_t begin = piece * p.kSteps;
    const int64_t end = begin + p.kSteps < p.seqlen ? begin + p.kSteps : p.seqlen;
    padded_piece(p, b, c, begin, end,
                 static_cast<R*>(p.partial) + part * (p.width + 1) * p.dim + c);
  }
}

// ---- channel-last

// A thread's walk over a piece of kVec channels; [first, last) is the run, with zeros around it.
template <class T, int kWidth, int kVec>
struct Walk {
  Taps<kWidth, kVec> taps;
  float x[kWidth][kVec];     // the inputs that the present output sees, in order of time
  float dpre[kWidth][kVec];  // of the present output and those before it, the newest last
  float sums[kWidth + 1][kVec];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x[k][c] = dpre[k][c] = sums[k][c] = 0;
      sums[kWidth][c] = 0;
    }
  }

  // The next output, with its newest input and the gradient of its result. `counts`: it is of the
  // piece. Returns dx of the input that no later output sees.
  __device__ __forceinline__ Pack<T, kVec> step(const Pack<T, kVec>& input,
                                                const Pack<T, kVec>& gradient, bool silu,
                                                bool inside, bool counts) {
    float newest[kVec], dy[kVec], dx[kVec];
    input.unpack(newest);
    gradient.unpack(dy);
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) x[k][c] = x[k + 1][c], dpre[k][c] = dpre[k + 1][c];
      x[kWidth - 1][c] = newest[c];
      float pre = taps.bias[c];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) pre += taps.w[k][c] * x[k][c];
      const float d = inside ? activate_vjp(pre, dy[c], silu) : 0.0f;
      dpre[kWidth - 1][c] = d;
      dx[c] = 0;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) dx[c] += taps.w[k][c] * dpre[kWidth - 1 - k][c];
      if (!counts) continue;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k][c] += d * x[k][c];
      sums[kWidth][c] += d;
    }
    return Pack<T, kVec>::of(dx);
  }
};

// Does the piece see a state? Then its channels are done one by one.
__device__ __forceinline__ bool sees_state(const BwdParams& p, const Run& first, const Run& last,
                                           int64_t begin, int64_t end) {
  if (!p.initial_state && !p.dfinal_state) return false;
  const int64_t reach = 2 * (p.width - 1);
  return begin - reach < first.begin || end + reach > last.end;
}

// Thread: kVec channels of a piece. Grid over (batch, piece, group of channels).
template <class T, int kWidth, int kVec>
__global__ __launch_bounds__(kThreads, 3) void channel_last_kernel(const BwdParams p,
                                                                   Divisor pieces, Divisor groups,
                                                                   int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t group, piece;
    const int64_t part = groups.divide(task, group), b = pieces.divide(part, piece);
    const int64_t channel = group * kVec, begin = piece * p.kSteps;
    const int64_t end = begin + p.kSteps < p.seqlen ? begin + p.kSteps : p.seqlen;
    const int64_t channels = p.dim - channel < kVec ? p.dim - channel : kVec;
    float* sums = static_cast<float*>(p.partial) + part * (kWidth + 1) * p.dim + channel;
    const int64_t reach = 2 * (kWidth - 1);
    const bool last_first = p.mode == Mode::kAnticausal;
    const Run first = run_at(p.sequences, b, begin, reach, last_first);
    const Run last = run_at(p.sequences, b, end - 1, reach, last_first);
    if (channels < kVec || !in_one_run(p.sequences, b, begin, end) ||
        sees_state(p, first, last, begin, end)) {
#pragma unroll 1
      for (int64_t c = 0; c < channels; ++c) {
        padded_piece(p, b, channel + c, begin, end, sums + c);
      }
      continue;
    }

    const int64_t left = p.left(), right = p.right();
    auto row = [&](const View<3>& v, int64_t t) {
      return static_cast<T*>(v.data) + b * v.stride[0] + t * v.stride[2] + channel;
    };
    auto in_run = [&](int64_t t) { return t >= first.begin && t < last.end; };
    auto load = [&](const View<3>& v, int64_t t) {
      return in_run(t) ? Pack<T, kVec>::load(row(v, t)) : Pack<T, kVec>{};
    };
    Walk<T, kWidth, kVec> walk;
    walk.taps.load(p, channel);
    walk.clear();
    // Outputs from begin - right on; before that, the inputs that the first of them sees.
#pragma unroll
    for (int k = 1; k < kWidth; ++k) {
      load(p.x, begin - right - left + k - 1).unpack(walk.x[k]);
    }
    for (int64_t t0 = begin - right; t0 < end + left; t0 += kRows) {
      Pack<T, kVec> x[kRows], dy[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        x[i] = load(p.x, t0 + i + right);
        dy[i] = load(p.dy, t0 + i);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t t = t0 + i;
        const Pack<T, kVec> dx = walk.step(x[i], dy[i], p.silu, in_run(t), t >= begin && t < end);
        if (t - left >= begin && t - left < end) dx.store(row(p.dx, t - left));
      }
    }
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) sums[k * p.dim + c] = walk.sums[k][c];
    }
  }
}

// ---- states and sums

// The run that begins (for anticausal: ends) with a slot's initial state.
__device__ __forceinline__ Run initial_run(const Sequences& s, int64_t slot, bool last_first) {
  if (s.offsets) return packed_run(s, slot);
  if (!s.ids) return {0, s.seqlen, slot};
  const RunEnds ends = s.ends[slot];
  if (last_first) return {ends.last_begin, ends.end, slot};
  return {ends.begin, ends.first_end, slot};
}

// Thread: one element of the gradient of an initial state.
template <class R>
__global__ __launch_bounds__(kThreads) void initial_state_kernel(const BwdParams p, Divisor length,
                                                                 Divisor dim, int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  const bool last_first = p.mode == Mode::kAnticausal;
  const View<3>& state = p.dinitial_state;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t i, c;
    const int64_t slot = dim.divide(length.divide(task, i), c);
    const Run run = initial_run(p.sequences, slot, last_first);
    const int64_t b = p.sequences.offsets ? 0 : slot;
    const int64_t t = last_first ? run.end + i : run.begin - (p.width - 1) + i;
    store_element(state.data, state.dtype,
                  slot * state.stride[0] + c * state.stride[1] + i * state.stride[2],
                  padded_dx<R>(p, run, b, c, t));
  }
}

// Thread: one element of dweight (k < width) or of dbias, summed over the parts in their order.
template <class R>
__global__ __launch_bounds__(kThreads) void sum_kernel(const BwdParams p, Divisor dim,
                                                       int64_t parts, int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    const R* partial = static_cast<const R*>(p.partial) + task;
    R sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += partial[i * tasks];
    int64_t c;
    const int64_t k = dim.divide(task, c);
    if (k < p.width) {
      store_element(p.dweight.data, p.dweight.dtype,
                    c * p.dweight.stride[0] + tap_index(p, k) * p.dweight.stride[1], sum);
    } else if (p.dbias) {
      store_element(p.dbias.data, p.dbias.dtype, c * p.dbias.stride[0], sum);
    }
  }
}

// ---- launches

template <class T, int kWidth, int kVec>
void launch_channel_last(const BwdParams& p, cudaStream_t stream) {
  const int64_t groups = (p.dim + kVec - 1) / kVec, tasks = p.parts() * groups;
  launch("causal_conv1d bwd, channel-last", channel_last_kernel<T, kWidth, kVec>,
         blocks_for(tasks, kThreads), kThreads, 0, stream, p, Divisor(p.pieces()), Divisor(groups),
         tasks);
}

// Four channels of a thread: with eight, the walk would not fit the registers.
template <class T, int kWidth>
void launch_fast(const BwdParams& p, cudaStream_t stream) {
  if (starts_aligned(p.x, 4) && starts_aligned(p.dy, 4) && starts_aligned(p.dx, 4)) {
    launch_channel_last<T, kWidth, 4>(p, stream);
  } else {
    launch_channel_last<T, kWidth, 1>(p, stream);
  }
}

bool is_fast(const BwdParams& p) {
  return p.compute == DType::kFloat32 && p.dy && p.x.dtype == p.dy.dtype &&
         p.x.dtype == p.dx.dtype && p.width >= 2 && p.width <= 4 && p.x.stride[1] == 1 &&
         p.dy.stride[1] == 1 && p.dx.stride[1] == 1;
}

// The kernels that compute in R.
template <class R>
void launch_any(const BwdParams& p, cudaStream_t stream) {
  const int64_t tasks = p.parts() * p.dim;
  launch("causal_conv1d bwd, any layout", any_kernel<R>, blocks_for(tasks, kThreads), kThreads, 0,
         stream, p, Divisor(p.pieces()), Divisor(p.dim), tasks);
}

template <class R>
void launch_rest(const BwdParams& p, cudaStream_t stream) {
  const int64_t state = p.dinitial_state ? p.sequences.slots() * p.dim * (p.width - 1) : 0;
  if (state > 0) {
    launch("causal_conv1d bwd, initial state", initial_state_kernel<R>, blocks_for(state, kThreads),
           kThreads, 0, stream, p, Divisor(p.width - 1), Divisor(p.dim), state);
  }
  const int64_t sums = (p.width + 1) * p.dim;
  if (sums > 0) {
    launch("causal_conv1d bwd, sums", sum_kernel<R>, blocks_for(sums, kThreads), kThreads, 0,
           stream, p, Divisor(p.dim), p.parts(), sums);
  }
}

}  // namespace

void bwd(const BwdParams& p, cudaStream_t stream) {
  const bool wide = p.compute == DType::kFloat64;
  if (p.sequences.ends != nullptr) find_run_ends(p.sequences, stream);
  if (p.batch * p.dim * p.seqlen > 0) {
    if (is_fast(p)) {
      with_fast_type(p.x.dtype, [&](auto* type) {
        with_fast_width(p.width, [&](auto width) {
          launch_fast<std::remove_pointer_t<decltype(type)>, width()>(p, stream);
        });
      });
    } else {
      wide ? launch_any<double>(p, stream) : launch_any<float>(p, stream);
    }
  }
  wide ? launch_rest<double>(p, stream) : launch_rest<float>(p, stream);
}

}  // namespace statescan::causal_conv1d::cuda
