// Backward of the short convolution on the GPU, from nothing but the inputs, which are read once:
//
//   a kernel for the layout    dx, and the sums of dweight and dbias of each piece, a row of `partial`
//   edge_dx, edge_sums         what initial and final states reach: dx, and a row for each slot
//   initial_state_kernel       the gradient of the initial state
//   sum_kernel                 dweight and dbias: the rows of `partial`, always in the same order
//
// so that the gradients are deterministic. Tensors of mixed or double type, other strides and widths go one
// number at a time (any_dx, any_sums), edges included.
#include <algorithm>

#include "causal_conv1d/bwd_first.cuh"
#include "causal_conv1d/bwd_last.cuh"
#include "common/launch.h"
#include "common/shared.cuh"

namespace statescan::causal_conv1d::cuda {
namespace {

constexpr int kThreads = kBwdThreads;

// ---- any layout. A task of little more than one sum: ptxas keeps track of no deeper nests of loops and
// branches without local memory.

// Thread: one element of dx. Neighbouring threads have neighbouring channels or steps, whichever lie
// closer in memory.
template <class R>
__global__ __launch_bounds__(kThreads) void any_dx_kernel(const BwdParams p, Divisor inner,
                                                          Divisor outer, bool channels_inside,
                                                          int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t i, j;
    const int64_t b = outer.divide(inner.divide(task, i), j);
    const int64_t c = channels_inside ? i : j, t = channels_inside ? j : i;
    const Run run = run_near(p, b, t);
    store_dx(p, b, c, t, run.begin == run.end ? R(0) : padded_dx<R>(p, run, b, c, t));
  }
}

// What the outputs at `at` add to dweight[k] or dbias, every step-th of them.
template <class R>
__device__ __forceinline__ R sum_terms(const BwdParams& p, int64_t b, int64_t c, int64_t k,
                                       Interval at, int step) {
  R sum = 0;
#pragma unroll 1
  for (int64_t t = at.begin; t < at.end; t += step) {
    const Run run = run_near(p, b, t);
    if (run.begin < run.end) sum += padded_term<R>(p, run, b, c, t, k);
  }
  return sum;
}

// kTeam lanes add up one element of `partial` together, each every kTeam-th time step. Grid over (batch,
// piece, width + 1, channel). Neighbouring lanes are at neighbouring times (kTeam = 32) or channels (1).
template <class R, int kTeam>
__global__ __launch_bounds__(kThreads) void any_sums_kernel(const BwdParams p, Divisor pieces,
                                                            Divisor taps, Divisor dim,
                                                            int64_t tasks) {
  const int64_t teams = int64_t(gridDim.x) * (kThreads / kTeam);
  const int64_t lane = threadIdx.x % kTeam;
  const int64_t team = int64_t(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  for (int64_t task = team; task < tasks; task += teams) {
    int64_t c, k, piece;
    const int64_t b = pieces.divide(taps.divide(dim.divide(task, c), k), piece);
    const int64_t begin = piece * p.steps;
    const int64_t end = begin + p.steps < p.seqlen ? begin + p.steps : p.seqlen;
    R sum = sum_terms<R>(p, b, c, k, {begin + lane, end}, kTeam);
    __syncwarp();
#pragma unroll
    for (int lanes = kTeam / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    }
    if (lane == 0) static_cast<R*>(p.partial)[task] = sum;
  }
}

// ---- states

// The run that begins (for anticausal: ends) with a slot's initial state, or the other way round.
__device__ __forceinline__ Run run_of_slot(const Sequences& s, int64_t slot, bool last) {
  if (s.offsets) return packed_run(s, slot);
  if (!s.ids) return {0, s.seqlen, slot};
  const RunEnds ends = s.ends[slot];
  if (last) return {ends.last_begin, ends.end, ends.last_begin == ends.begin ? slot : -1};
  return {ends.begin, ends.first_end, slot};
}

__device__ __forceinline__ Edges edges_of_slot(const BwdParams& p, int64_t slot) {
  const Sequences& s = p.sequences;
  return Edges(p, s.offsets ? ends_of(packed_run(s, slot)) : ends_of(s, slot));
}

// Thread: dx at the i-th of 2 (width - 1) places that a slot's states reach in one channel, see Edges.
__global__ __launch_bounds__(kThreads) void edge_dx_kernel(const BwdParams p, Divisor places,
                                                           Divisor dim, int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t i, c;
    const int64_t slot = dim.divide(places.divide(task, i), c);
    const int64_t b = p.sequences.offsets ? 0 : slot;
    const Edges edges = edges_of_slot(p, slot);
    const bool first = i < p.width - 1;
    const int64_t t = first ? edges.initial.begin + i : edges.final.begin + i - (p.width - 1);
    if (t >= (first ? edges.initial.end : edges.final.end)) continue;
    if (!first && edges.initial.holds(t)) continue;  // of a short run: it is done already
    const Run run = run_near(p, b, t);
    if (p.sequences.offsets && run.slot != slot) continue;  // offsets that make no sense
    store_dx(p, b, c, t, padded_dx<float>(p, run, b, c, t));
  }
}

// Thread: one element of the row of `partial` for what a slot's initial state reaches.
__global__ __launch_bounds__(kThreads) void edge_sums_kernel(const BwdParams p, Divisor taps,
                                                             Divisor dim, int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  float* partial = static_cast<float*>(p.partial) + p.parts() * (p.width + 1) * p.dim;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t c, k;
    const int64_t slot = taps.divide(dim.divide(task, c), k), b = p.sequences.offsets ? 0 : slot;
    partial[task] = sum_terms<float>(p, b, c, k, edges_of_slot(p, slot).initial, 1);
  }
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
    Run run = run_of_slot(p.sequences, slot, last_first);
    run.slot = slot;
    const int64_t b = p.sequences.offsets ? 0 : slot;
    const int64_t t = last_first ? run.end + i : run.begin - (p.width - 1) + i;
    store_element(state.data, state.dtype,
                  slot * state.stride[0] + c * state.stride[1] + i * state.stride[2],
                  padded_dx<R>(p, run, b, c, t));
  }
}

// ---- sums

constexpr int kColumns = 32, kSumLanes = 16;

template <class R>
struct SumScratch {
  SharedArray<R, kColumns * kSumLanes> sum;
};

// Block: 32 neighbouring elements of dweight (k < width) and dbias, 16 threads for each: thread i adds
// up rows i, i + 16, .. of `partial`, and the first one adds up what they have.
template <class R>
__global__ __launch_bounds__(kColumns* kSumLanes) void sum_kernel(const BwdParams p, Divisor dim,
                                                                  int64_t rows, int64_t columns) {
  auto& scratch = block_shared<SumScratch<R>>();
  const int own = int(threadIdx.x % kColumns), lane = int(threadIdx.x / kColumns);
  for (int64_t first = int64_t(blockIdx.x) * kColumns; first < columns;
       first += int64_t(gridDim.x) * kColumns) {
    const int64_t column = first + own;
    R sum = 0;
    if (column < columns) {
      const R* partial = static_cast<const R*>(p.partial) + column;
#pragma unroll 8
      for (int64_t i = lane; i < rows; i += kSumLanes) sum += partial[i * columns];
    }
    scratch.sum[lane * kColumns + own] = sum;
    __syncthreads();  // all rows are in some thread's sum
    if (lane == 0 && column < columns) {
      for (int i = 1; i < kSumLanes; ++i) sum += scratch.sum[i * kColumns + own];
      int64_t c;
      const int64_t k = dim.divide(column, c);
      if (k < p.width) {
        store_element(p.dweight.data, p.dweight.dtype,
                      c * p.dweight.stride[0] + tap_index(p, k) * p.dweight.stride[1], sum);
      } else if (p.dbias) {
        store_element(p.dbias.data, p.dbias.dtype, c * p.dbias.stride[0], sum);
      }
    }
    __syncthreads();  // they have been read
  }
}

// ---- launches

bool is_fast(const BwdParams& p) {
  return p.compute == DType::kFloat32 && p.dy && p.x.dtype == p.dy.dtype &&
         p.x.dtype == p.dx.dtype && p.width >= 2 && p.width <= 4;
}

bool all_have_stride_1(const BwdParams& p, int dimension) {
  return p.x.stride[dimension] == 1 && (!p.dy || p.dy.stride[dimension] == 1) &&
         p.dx.stride[dimension] == 1;
}

bool is_channel_last(const BwdParams& p) { return is_fast(p) && all_have_stride_1(p, 1); }
bool is_channel_first(const BwdParams& p) { return is_fast(p) && all_have_stride_1(p, 2); }

int64_t row_steps(const BwdParams& p) { return 32 * 16 / element_bytes(p.x.dtype); }

template <class T, int kWidth>
void launch_channel_first(const BwdParams& p, cudaStream_t stream) {
  auto launch_for = [&](auto left) {
    if constexpr (left() < kWidth) {
      const int64_t tasks = p.parts() * p.dim;
      launch("causal_conv1d bwd, channel-first", channel_first_kernel<T, kWidth, left()>,
             blocks_for(tasks, kThreads / 32), kThreads, 0, stream, p, Divisor(p.pieces),
             Divisor(p.dim), tasks);
    }
  };
  if (p.mode == Mode::kCausal) return launch_for(std::integral_constant<int, kWidth - 1>{});
  if (p.mode == Mode::kAnticausal) return launch_for(std::integral_constant<int, 0>{});
  if constexpr (kWidth == 3) launch_for(std::integral_constant<int, 1>{});
}

template <class T, int kWidth, int kVec>
void launch_channel_last(const BwdParams& p, cudaStream_t stream) {
  const int64_t groups = p.dim / kVec, tasks = p.parts() * groups;
  launch("causal_conv1d bwd, channel-last", channel_last_kernel<T, kWidth, kVec>,
         blocks_for(tasks, kThreads), kThreads, 0, stream, p, Divisor(p.pieces), Divisor(groups),
         tasks);
}

// Four channels of a thread: with eight, the walk would not fit the registers.
template <class T, int kWidth>
void launch_fast(const BwdParams& p, cudaStream_t stream) {
  if (!is_channel_last(p)) {
    launch_channel_first<T, kWidth>(p, stream);
  } else if (p.dim % 4 == 0 && starts_aligned(p.x, 4) && starts_aligned(p.dy, 4) &&
             starts_aligned(p.dx, 4)) {
    launch_channel_last<T, kWidth, 4>(p, stream);
  } else {
    launch_channel_last<T, kWidth, 1>(p, stream);
  }
}

void launch_edges(const BwdParams& p, cudaStream_t stream) {
  if (!p.initial_state && !p.dfinal_state) return;
  const int64_t places = 2 * (p.width - 1), tasks = p.sequences.slots() * p.dim * places;
  launch("causal_conv1d bwd, dx at the edges", edge_dx_kernel, blocks_for(tasks, kThreads),
         kThreads, 0, stream, p, Divisor(places), Divisor(p.dim), tasks);
  const int64_t sums = p.edge_rows * (p.width + 1) * p.dim;
  if (sums == 0) return;
  launch("causal_conv1d bwd, sums at the edges", edge_sums_kernel, blocks_for(sums, kThreads),
         kThreads, 0, stream, p, Divisor(p.width + 1), Divisor(p.dim), sums);
}

template <class R>
void launch_any(const BwdParams& p, cudaStream_t stream) {
  const bool over_time = p.x.stride[2] < p.x.stride[1];
  const int64_t tasks = p.batch * p.dim * p.seqlen;
  launch("causal_conv1d bwd, dx of any layout", any_dx_kernel<R>, blocks_for(tasks, kThreads),
         kThreads, 0, stream, p, Divisor(over_time ? p.seqlen : p.dim),
         Divisor(over_time ? p.dim : p.seqlen), !over_time, tasks);
  const int64_t sums = p.parts() * (p.width + 1) * p.dim;
  launch("causal_conv1d bwd, sums of any layout",
         over_time ? any_sums_kernel<R, 32> : any_sums_kernel<R, 1>,
         blocks_for(sums, over_time ? kThreads / 32 : kThreads), kThreads, 0, stream, p,
         Divisor(p.pieces), Divisor(p.width + 1), Divisor(p.dim), sums);
}

template <class R>
void launch_rest(const BwdParams& p, cudaStream_t stream) {
  const int64_t state = p.dinitial_state ? p.sequences.slots() * p.dim * (p.width - 1) : 0;
  if (state > 0) {
    launch("causal_conv1d bwd, initial state", initial_state_kernel<R>, blocks_for(state, kThreads),
           kThreads, 0, stream, p, Divisor(p.width - 1), Divisor(p.dim), state);
  }
  const int64_t columns = (p.width + 1) * p.dim;
  if (columns > 0) {
    launch("causal_conv1d bwd, sums", sum_kernel<R>, blocks_for(columns, kColumns),
           kColumns * kSumLanes, 0, stream, p, Divisor(p.dim), p.rows(), columns);
  }
}

}  // namespace

// Pieces as long as the shape allows while there are enough of them: 4096 warps are 30 for each SM of
// the largest GPU. It follows from the shape alone, and so does the order of the sums.
void plan(BwdParams& p) {
  if (p.batch * p.dim * p.seqlen == 0) {
    p.steps = 1, p.pieces = 0, p.edge_rows = 0;
    return;
  }
  const bool fast = is_channel_last(p) || is_channel_first(p);
  const bool over_time = is_channel_last(p) ? false : p.x.stride[2] < p.x.stride[1];
  const bool rows = is_channel_first(p) && !is_channel_last(p);
  const int64_t unit = rows ? row_steps(p) : over_time ? 128 : 32;
  const int64_t least = rows ? 4 * unit : unit, most = rows ? 64 * unit : over_time ? 1024 : 256;
  const int64_t lanes = is_channel_last(p) ? (p.dim + 3) / 4 : over_time ? p.dim * 32 : p.dim;
  const int64_t wanted = 4096 * 32 / (p.batch * lanes) + 1;  // pieces
  // Packs are counted from the aligned address before a row: up to a pack more than its steps.
  const int64_t length = p.seqlen + (rows ? row_steps(p) / 32 - 1 : 0);
  p.steps = std::clamp((length / wanted + unit - 1) / unit * unit, least, most);
  p.pieces = (length + p.steps - 1) / p.steps;
  p.edge_rows = fast && p.initial_state ? p.sequences.slots() : 0;
}

void bwd(const BwdParams& p, cudaStream_t stream) {
  const bool wide = p.compute == DType::kFloat64;
  if (p.sequences.ends != nullptr) find_run_ends(p.sequences, stream);
  if (p.parts() > 0) {
    if (is_channel_last(p) || is_channel_first(p)) {
      with_fast_type(p.x.dtype, [&](auto* type) {
        with_fast_width(p.width, [&](auto width) {
          launch_fast<std::remove_pointer_t<decltype(type)>, width()>(p, stream);
        });
      });
      launch_edges(p, stream);
    } else {
      wide ? launch_any<double>(p, stream) : launch_any<float>(p, stream);
    }
  }
  wide ? launch_rest<double>(p, stream) : launch_rest<float>(p, stream);
}

}  // namespace statescan::causal_conv1d::cuda
