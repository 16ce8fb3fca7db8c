// Decode steps of the short convolution on the GPU, and states for them out of packed sequences.
//
// A thread takes one channel of one batch element, all its tokens in order: nobody else touches its
// state. A step is a wait for one trip to memory, so the usual case (a state of width or width - 1
// inputs in order, all of one dtype) loads everything before it computes anything.
//
// What indices hold is read here, on the device. A slot that does not exist is skipped like a negative
// one; that slots differ from each other is up to the caller.
#include "causal_conv1d/padded.cuh"
#include "common/divisor.h"
#include "common/launch.h"

namespace statescan::causal_conv1d::cuda {
namespace {

constexpr int kThreads = 64;  // few: a small batch spreads over more SMs

template <class R>
__device__ __forceinline__ void store_y(const UpdateParams& p, int64_t b, int64_t c, int64_t t,
                                        R y) {
  store_element(p.y.data, p.y.dtype, b * p.y.stride[0] + c * p.y.stride[1] + t * p.y.stride[2], y);
}

// ---- the usual case

// kWidth neighbours at once, 8 or 16 bytes (kPacked), or one by one.
template <bool kPacked, class T, int kWidth>
__device__ __forceinline__ void load_line(const T* from, int64_t step, float (&x)[kWidth]) {
  if constexpr (kPacked) {
    Pack<T, kWidth>::load(from).unpack(x);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x[k] = to_number(from[k * step]);
  }
}

// Thread: a channel of a batch element. The state's last kWidth - 1 inputs and the newest are in
// registers. kPacked: a state of kWidth inputs and the taps lie in lines.
template <class T, int kWidth, bool kPacked>
__global__ __launch_bounds__(kThreads) void short_state_kernel(const UpdateParams p, Divisor dim,
                                                               int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t c;
    const int64_t b = dim.divide(task, c), slot = slot_at(p.slot_of, p.slots, b);
    T* y = static_cast<T*>(p.y.data) + b * p.y.stride[0] + c * p.y.stride[1];
    if (slot < 0) {
      for (int64_t t = 0; t < p.tokens; ++t) y[t * p.y.stride[2]] = from_number<T>(0);
      continue;
    }
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c * p.x.stride[1];
    const T* weight = static_cast<const T*>(p.weight.data) + c * p.weight.stride[0];
    const int64_t step = p.state.stride[2], skipped = p.state_len - (kWidth - 1);
    T* state = static_cast<T*>(p.state.data) + slot * p.state.stride[0] + c * p.state.stride[1];

    float seen[kWidth], taps[kWidth], newest = to_number(x[0]), bias = 0;
    if constexpr (kPacked) {
      load_line<true>(state, 1, seen);
    } else {
#pragma unroll
      for (int k = 1; k < kWidth; ++k) seen[k] = to_number(state[(k - 1 + skipped) * step]);
    }
    load_line<kPacked>(weight, p.weight.stride[1], taps);
    if (p.bias) bias = to_number(static_cast<const T*>(p.bias.data)[c * p.bias.stride[0]]);
    for (int64_t t = 0; t < p.tokens; ++t) {
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) seen[k] = seen[k + 1];
      seen[kWidth - 1] = newest;
      if (t + 1 < p.tokens) newest = to_number(x[(t + 1) * p.x.stride[2]]);
      float pre = bias;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) pre += taps[k] * seen[k];
      y[t * p.y.stride[2]] = from_number<T>(activate(pre, p.silu));
    }
    if constexpr (kPacked) {
      Pack<T, kWidth>::of(seen).store(state);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int64_t i = k - 1 + skipped;  // a state of width - 1 inputs does not keep the oldest
        if (i >= 0) state[i * step] = from_number<T>(seen[k]);
      }
    }
  }
}

// ---- any state

// The state of one channel, as positions of inputs.
struct AnyState {
  const UpdateParams& p;
  int64_t offset, first;  // of its elements; the position in the state of new token 0

  __device__ __forceinline__ AnyState(const UpdateParams& params, int64_t b, int64_t c,
                                      int64_t slot)
      : p(params), offset(slot * p.state.stride[0] + c * p.state.stride[1]), first(p.state_len) {
    if (!p.positions || p.state_len == 0) return;
    first = p.positions.at(b) % p.state_len;
    if (first < 0) first += p.state_len;
  }

  // Where the input `back` before new token 0 is, 1 <= back <= state_len.
  __device__ __forceinline__ int64_t before(int64_t back) const {
    const int64_t i = first - back;
    return offset + (i < 0 ? i + p.state_len : i) * p.state.stride[2];
  }
};

// Input j of those of this call, or for j < 0 of those before it.
template <class R>
__device__ __forceinline__ R input_at(const UpdateParams& p, const AnyState& state, int64_t b,
                                      int64_t c, int64_t j) {
  if (j < 0) return load_element<R>(p.state.data, p.state.dtype, state.before(-j));
  return load_element<R>(p.x.data, p.x.dtype,
                         b * p.x.stride[0] + c * p.x.stride[1] + j * p.x.stride[2]);
}

// The new tokens take the places of the oldest inputs in a circular state; otherwise all inputs move.
template <class R>
__device__ __forceinline__ void move_on(const UpdateParams& p, const AnyState& state, int64_t b,
                                        int64_t c) {
  if (!p.positions) {
#pragma unroll 1
    for (int64_t i = 0; i < p.state_len; ++i) {  // from behind i: what is there is still old
      store_element(p.state.data, p.state.dtype, state.offset + i * p.state.stride[2],
                    input_at<R>(p, state, b, c, i + p.tokens - p.state_len));
    }
    return;
  }
  const int64_t kept = p.tokens < p.state_len ? p.tokens : p.state_len;
  int64_t at = kept > 0 ? (state.first + p.tokens - kept) % p.state_len : 0;
#pragma unroll 1
  for (int64_t j = p.tokens - kept; j < p.tokens; ++j) {
    store_element(p.state.data, p.state.dtype, state.offset + at * p.state.stride[2],
                  input_at<R>(p, state, b, c, j));
    if (++at == p.state_len) at = 0;
  }
}

// Thread: a channel of a batch element.
template <class R>
__global__ __launch_bounds__(kThreads) void any_state_kernel(const UpdateParams p, Divisor dim,
                                                             int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t c;
    const int64_t b = dim.divide(task, c), slot = slot_at(p.slot_of, p.slots, b);
    const AnyState state(p, b, c, slot);
    const int64_t width = slot < 0 ? 0 : p.width;  // what is skipped gives activate(0) = 0
#pragma unroll 1
    for (int64_t t = 0; t < p.tokens; ++t) {
      R pre = 0;
      if (slot >= 0 && p.bias) {
        pre = load_element<R>(p.bias.data, p.bias.dtype, c * p.bias.stride[0]);
      }
#pragma unroll 1
      for (int64_t k = 0; k < width; ++k) {
        const int64_t tap = c * p.weight.stride[0] + k * p.weight.stride[1];
        pre += load_element<R>(p.weight.data, p.weight.dtype, tap) *
               input_at<R>(p, state, b, c, t + k - (width - 1));
      }
      store_y(p, b, c, t, activate(pre, p.silu));
    }
    if (slot >= 0) move_on<R>(p, state, b, c);
  }
}

// ---- states of packed sequences

// Thread: one element.
template <class R>
__global__ __launch_bounds__(kThreads) void varlen_states_kernel(const VarlenStatesParams p,
                                                                 Divisor length, Divisor dim,
                                                                 int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t i, c;
    const int64_t slot = dim.divide(length.divide(task, i), c);
    const Run run = packed_run(p.sequences, slot);
    const int64_t t = run.end - p.state_len + i;
    R x = 0;
    if (t >= run.begin) {
      x = load_element<R>(p.x.data, p.x.dtype, c * p.x.stride[1] + t * p.x.stride[2]);
    }
    store_element(p.states.data, p.states.dtype,
                  slot * p.states.stride[0] + c * p.states.stride[1] + i * p.states.stride[2], x);
  }
}

bool is_usual(const UpdateParams& p) {
  const DType dtype = p.x.dtype;
  return p.compute == DType::kFloat32 && p.width >= 2 && p.width <= 4 && p.tokens > 0 &&
         p.state_len <= p.width && !p.positions && p.state.dtype == dtype &&
         p.weight.dtype == dtype && (!p.bias || p.bias.dtype == dtype);
}

template <class T, int kWidth>
void launch_usual(const UpdateParams& p, int64_t tasks, cudaStream_t stream) {
  bool packed = false;
  if constexpr (kWidth == 4) {
    packed = p.state_len == 4 && in_lines(p.state, 4) && in_lines(p.weight, 4);
  }
  launch("causal_conv1d update",
         packed ? short_state_kernel<T, kWidth, kWidth == 4> : short_state_kernel<T, kWidth, false>,
         blocks_for(tasks, kThreads), kThreads, 0, stream, p, Divisor(p.dim), tasks);
}

}  // namespace

void update(const UpdateParams& p, cudaStream_t stream) {
  const int64_t tasks = p.tokens > 0 ? p.batch * p.dim : 0, blocks = blocks_for(tasks, kThreads);
  if (blocks == 0) return;
  if (is_usual(p)) {
    with_fast_type(p.x.dtype, [&](auto* type) {
      with_fast_width(p.width, [&](auto width) {
        launch_usual<std::remove_pointer_t<decltype(type)>, width()>(p, tasks, stream);
      });
    });
  } else {
    launch("causal_conv1d update, any state",
           p.compute == DType::kFloat64 ? any_state_kernel<double> : any_state_kernel<float>,
           blocks, kThreads, 0, stream, p, Divisor(p.dim), tasks);
  }
}

void varlen_states(const VarlenStatesParams& p, cudaStream_t stream) {
  const int64_t tasks = p.sequences.count * p.dim * p.state_len;
  if (tasks == 0) return;
  launch("causal_conv1d varlen states",
         p.x.dtype == DType::kFloat64 ? varlen_states_kernel<double> : varlen_states_kernel<float>,
         blocks_for(tasks, kThreads), kThreads, 0, stream, p, Divisor(p.state_len), Divisor(p.dim),
         tasks);
}

}  // namespace statescan::causal_conv1d::cuda
