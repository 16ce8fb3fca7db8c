// The step of a Mamba-2 block on the GPU: convolution and state update in one launch.
//
//   block   some heads of a group      B, C   the convolution's outputs, in shared memory
//                                      |
//           warp 0   rows of the state, their x by the lanes that also compute their step sizes
//           warp 1   ..                as in selective_state_update/update.cu
//
// B and C of a group are computed by every block that has heads of it: from 2 x state x (2 width +
// 1) numbers that all but the first find in the second-level cache.
//
// Blocks neither wait for nor know of each other. The state of the convolution is circular, and
// there is room for the new inputs beside those that the tokens see (state_len >= width - 1 +
// tokens): nobody writes what another one reads. Of a channel's new inputs only one thread takes
// care: of x the lane that has the row, of B and C the group's first block. A state that is kept in
// order has to be read by all before anyone moves it: that takes two launches, as do wider filters
// and other strides.
//
// Grid over (batch, group, share of the group's heads), strided over. Dynamic shared memory: B and
// C of every token, 2 x tokens x state floats.
#include "common/divisor.h"
#include "common/launch.h"
#include "common/shared.cuh"
#include "mamba2_step/cuda.h"
#include "selective_state_update/rows.cuh"

#include "causal_conv1d/equations.h"

namespace statescan::mamba2_step::cuda {
namespace {

using causal_conv1d::cuda::UpdateParams;
using selective_state_update::cuda::Place;
using selective_state_update::cuda::Raw;
using selective_state_update::cuda::Rows;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTaps = 4;  // at most
constexpr int64_t kSharedBytes = 32 * 1024;

// Registers for 16 warps of an SM, 32 KiB of the state on their way: beside the state, a lane has
// what three outputs of the convolution take.
constexpr int blocks_of_sm(int packs) { return packs > 1 ? 3 : 4; }

// How the rows of a group's heads are shared out: `works` of a warp to each block, `parts` to each
// head.
struct Plan {
  int log_lanes;
  int64_t works, works_of_group;
  Divisor groups, shares, parts;
  Divisor places;  // of a circular state
};

// Where the inputs of a batch element are.
struct Ring {
  int64_t b, slot;
  int64_t first;  // where token 0 goes

  __device__ __forceinline__ Ring(const UpdateParams& p, const Divisor& places, int64_t batch)
      : b(batch), slot(slot_at(p.slot_of, p.slots, batch)) {
    const int64_t position = p.positions.at(b);
    places.divide(position < 0 ? ~position : position, first);
    if (position < 0) first = p.state_len - 1 - first;
  }

  // Of input j, counted from token 0, in a channel's state.
  __device__ __forceinline__ int64_t offset(const UpdateParams& p, int64_t c, int64_t j) const {
    int64_t i = first + j;
    i += i < 0 ? p.state_len : i >= p.state_len ? -p.state_len : 0;
    return slot * p.state.stride[0] + c * p.state.stride[1] + i * p.state.stride[2];
  }
};

__device__ __forceinline__ int64_t input_offset(const UpdateParams& p, int64_t b, int64_t c,
                                                int64_t t) {
  return b * p.x.stride[0] + c * p.x.stride[1] + t * p.x.stride[2];
}

// All that one output of the convolution takes, loaded before anything is computed from it.
struct Window {
  Raw in[kTaps], tap[kTaps];  // in order of time, the newest last; zeros before a shorter filter
  Raw bias;

  __device__ __forceinline__ void load(const UpdateParams& p, const Ring& ring, int64_t c,
                                       int64_t t) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      const int64_t back = kTaps - 1 - k, j = t - back;
      in[k] = tap[k] = {};
      if (back >= p.width) continue;
      in[k] = j < 0 ? Raw::load(p.state.data, p.state.dtype, ring.offset(p, c, j))
                    : Raw::load(p.x.data, p.x.dtype, input_offset(p, ring.b, c, j));
      tap[k] = Raw::load(p.weight.data, p.weight.dtype,
                         c * p.weight.stride[0] + (p.width - 1 - back) * p.weight.stride[1]);
    }
    bias = p.bias ? Raw::load(p.bias.data, p.bias.dtype, c * p.bias.stride[0]) : Raw{};
  }

  // At token t. Rounded to the type of the inputs, as between two launches.
  __device__ __forceinline__ float output(const UpdateParams& p, int64_t t) const {
    float y = bias.number(p.bias.dtype);
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      const DType dtype = t + k < kTaps - 1 ? p.state.dtype : p.x.dtype;
      y += tap[k].number(p.weight.dtype) * in[k].number(dtype);
    }
    return Raw::of(causal_conv1d::activate(y, p.silu), p.x.dtype).number(p.x.dtype);
  }
};

__device__ __forceinline__ void keep_input(const UpdateParams& p, const Ring& ring, int64_t c,
                                           int64_t t) {
  const Raw x = Raw::load(p.x.data, p.x.dtype, input_offset(p, ring.b, c, t));
  Raw::of(x.number(p.x.dtype), p.state.dtype)
      .store(p.state.data, p.state.dtype, ring.offset(p, c, t));
}

// B and C of a group for all tokens, (token, 2, state), by all threads.
__device__ __forceinline__ void project(const Params& p, const Ring& ring, int64_t group,
                                        bool keeps, float* to) {
  const int64_t state = p.step.state, inner = p.step.heads * p.step.headdim;
  const int64_t B = inner + group * state, C = B + p.step.groups * state;
  for (int64_t t = 0; t < p.step.tokens; ++t, to += 2 * state) {
    for (int64_t n = threadIdx.x; n < state; n += kThreads) {
      Window B_n, C_n;
      B_n.load(p.conv, ring, B + n, t), C_n.load(p.conv, ring, C + n, t);
      to[n] = B_n.output(p.conv, t), to[state + n] = C_n.output(p.conv, t);
      if (keeps) keep_input(p.conv, ring, B + n, t), keep_input(p.conv, ring, C + n, t);
    }
  }
}

// Some rows of a head, as a warp has them, and the convolution that gives their x.
template <class T, int kPacks>
struct Work {
  using Share = Rows<T, float, kPacks, true>;
  Place at;
  Share rows;
  Window window;  // of the lane's own row

  __device__ __forceinline__ int own() const { return at.lane % Share::kRows; }
  __device__ __forceinline__ int64_t channel(const Params& p) const {
    return at.head * p.step.headdim + at.row(own());
  }

  // None, if there is no such work.
  __device__ __forceinline__ void place(const Params& p, const Plan& plan, int64_t b, int64_t group,
                                        int64_t work, int64_t last) {
    const int lane = int(threadIdx.x % 32);
    at.lanes = 1 << plan.log_lanes, at.places = 32 >> plan.log_lanes;
    at.lane = lane & (at.lanes - 1);
    at.b = b, at.group = group;
    int64_t part;
    at.head = group * (p.step.heads / p.step.groups) + plan.parts.divide(work, part);
    at.first_row = part * Share::kRows * at.places + (lane >> plan.log_lanes);
    const int64_t left = p.step.headdim - at.first_row, most = Share::kRows * at.places;
    at.rows = work >= last ? 0 : int(left < most ? left : most);
  }

  __device__ __forceinline__ T* state(const Params& p, const Ring& ring) const {
    return Share::state_at(p.step, at, ring.slot);
  }

  // All that does not wait for B and C, the state first.
  __device__ __forceinline__ void load(const Params& p, const Ring& ring) {
    rows.load_state(p.step, at, state(p, ring));
    load_token(p, ring, 0);
    rows.load_parameters(p.step, at);
  }
  __device__ __forceinline__ void load_token(const Params& p, const Ring& ring, int64_t t) {
    rows.load_token(p.step, at, t);
    if (at.has(own())) window.load(p.conv, ring, channel(p), t);
  }

  __device__ __forceinline__ void run(const Params& p, const Ring& ring, const float* projections) {
    for (int64_t t = 0;; projections += 2 * p.step.state) {
      rows.x = {at.has(own()) ? float_to_bits(window.output(p.conv, t)) : 0};
      rows.load_projections(p.step, at, projections, projections + p.step.state);
      float sum[Share::kRows];
      rows.advance(p.step, at, sum);
      rows.store_output(p.step, at, t, sum);
      if (++t == p.step.tokens) break;
      load_token(p, ring, t);
    }
    rows.store_state(p.step, at, state(p, ring));
    if (at.lane >= Share::kRows || !at.has(at.lane)) return;
    for (int64_t t = 0; t < p.step.tokens; ++t) keep_input(p.conv, ring, channel(p), t);
  }
};

template <class T, int kPacks>
__global__ __launch_bounds__(kThreads, blocks_of_sm(kPacks)) void step_kernel(const Params p,
                                                                              const Plan plan,
                                                                              int64_t tasks) {
  float* const projections = dynamic_shared<float>();
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t share, group;
    const int64_t b = plan.groups.divide(plan.shares.divide(task, share), group);
    const int64_t first = share * plan.works, end = first + plan.works;
    const int64_t last = end < plan.works_of_group ? end : plan.works_of_group;
    const Ring ring(p.conv, plan.places, b);
    Work<T, kPacks> own;
    int64_t work = first + threadIdx.x / 32;
    own.place(p, plan, b, group, work, last);
    if (ring.slot < 0) {
      for (; work < last; own.place(p, plan, b, group, work += kWarps, last)) {
        own.rows.store_nothing(p.step, own.at);
      }
      continue;
    }
    own.load(p, ring);
    project(p, ring, group, share == 0, projections);
    __syncthreads();  // B and C are there
    while (work < last) {
      own.run(p, ring, projections);
      work += kWarps;
      own.place(p, plan, b, group, work, last);
      if (work < last) own.load(p, ring);
    }
    __syncthreads();  // they have been read
  }
}

// ---- launches

template <class T>
bool is_fast(const Params& p) {
  constexpr int64_t kVec = kPackSize<T>;
  return in_lines(p.step.h, kVec) && p.step.state % kVec == 0 && p.step.state <= 64 * kVec;
}

template <class T, int kPacks>
void launch_step(const Params& p, cudaStream_t stream) {
  using Share = typename Work<T, kPacks>::Share;
  const int64_t packs = p.step.state / Share::kVec, heads = p.step.heads / p.step.groups;
  int log_lanes = 0;  // of a row: one at least for each of kRows
  while ((1 << log_lanes) * kPacks < packs || (1 << log_lanes) < Share::kRows) ++log_lanes;
  const int64_t rows = Share::kRows * (32 >> log_lanes);
  const int64_t parts = (p.step.headdim + rows - 1) / rows, all = heads * parts;
  // More rows for a block spare others to compute B and C, as long as 100 warps are left for each
  // SM.
  const int64_t blocks = (all + kWarps - 1) / kWarps;  // of a group, with one work for each warp
  const int64_t spare = p.step.batch * p.step.groups * all / (1 << 14) + 1;
  const int64_t works = kWarps * (spare < blocks ? spare : blocks);
  const int64_t shares = (all + works - 1) / works;
  const Plan plan{log_lanes,
                  works,
                  all,
                  Divisor(p.step.groups),
                  Divisor(shares),
                  Divisor(parts),
                  Divisor(p.conv.state_len)};
  const int64_t tasks = p.step.batch * p.step.groups * shares;
  launch("mamba2_step", step_kernel<T, kPacks>, blocks_for(tasks, 1), kThreads,
         size_t(2 * p.step.tokens * p.step.state) * sizeof(float), stream, p, plan, tasks);
}

template <class T>
void launch_typed(const Params& p, cudaStream_t stream) {
  const bool wide = p.step.state > 32 * kPackSize<T>;
  wide ? launch_step<T, 2>(p, stream) : launch_step<T, 1>(p, stream);
}

}  // namespace

bool in_one_launch(const Params& p) {
  const UpdateParams& conv = p.conv;
  const bool floats = conv.compute == DType::kFloat32 && p.step.compute == DType::kFloat32;
  const bool room = conv.positions && conv.state_len >= conv.width - 1 + conv.tokens;
  const bool fits = 2 * conv.tokens * p.step.state * int64_t(sizeof(float)) <= kSharedBytes;
  if (!floats || !room || !fits || conv.width > kTaps || p.step.headdim == 0) return false;
  switch (p.step.h.dtype) {
    case DType::kFloat32: return is_fast<float>(p);
    case DType::kFloat16: return is_fast<Half>(p);
    case DType::kBFloat16: return is_fast<BFloat16>(p);
    default: return false;
  }
}

void step(const Params& p, cudaStream_t stream) {
  if (!in_one_launch(p)) {
    causal_conv1d::cuda::update(p.conv, stream);
    selective_state_update::cuda::update(p.step, stream);
    return;
  }
  if (p.step.batch == 0 || p.step.heads == 0 || p.step.tokens == 0) return;
  Params convolved = p;
  convolved.step.x.dtype = DType::kFloat32;  // as the kernel hands it on
  switch (p.step.h.dtype) {
    case DType::kFloat16: return launch_typed<Half>(convolved, stream);
    case DType::kBFloat16: return launch_typed<BFloat16>(convolved, stream);
    default: return launch_typed<float>(convolved, stream);
  }
}

}  // namespace statescan::mamba2_step::cuda
