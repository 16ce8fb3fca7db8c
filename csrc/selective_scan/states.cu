// What comes before and after the selective scan's walks: what each token is, copies of states, sums
// of parts.
#include <algorithm>
#include <initializer_list>

#include "common/device_view.cuh"
#include "common/divisor.h"
#include "common/launch.h"
#include "selective_scan/tile.cuh"

namespace statescan::selective_scan::cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ int64_t first_task() {
  return int64_t(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ __forceinline__ int packed_mark(const Inputs& p, int64_t t) {
  const Run run = run_at(p.sequences, 0, t, 0, false);
  if (t < run.begin || t >= run.end) return kPadding;  // offsets that make no sense
  int mark = 0;
  if (t == (p.reverse ? run.end - 1 : run.begin)) mark |= kStart | kFromSlot;
  if (t == (p.reverse ? run.begin : run.end - 1)) mark |= kToSlot;
  return mark;
}

__device__ __forceinline__ int indexed_mark(const Inputs& p, int64_t b, int64_t t) {
  const IndexView& ids = p.sequences.ids;
  const int64_t id = ids.at(b, t);
  if (id < 0) return kPadding;
  auto is_of = [&](int64_t i) { return i >= 0 && i < p.seqlen && ids.at(b, i) == id; };
  const int64_t before = p.reverse ? t + 1 : t - 1, after = p.reverse ? t - 1 : t + 1;
  int mark = is_of(before) ? 0 : kStart;
  if (p.slots_per_row > 0) {
    if (id >= p.slots_per_row) return mark;
    if (mark & kStart) mark |= kFromSlot;
    return is_of(after) ? mark : mark | kToSlot;
  }
  const RunEnds ends = p.sequences.ends[b];
  if (t == (p.reverse ? ends.end - 1 : ends.begin)) mark |= kFromSlot;
  if (t == (p.reverse ? ends.begin : ends.end - 1)) mark |= kToSlot;
  return mark;
}

// Thread: a token.
__global__ __launch_bounds__(kThreads) void marks_kernel(const Inputs p, Divisor seqlen,
                                                         int64_t tasks) {
  for (int64_t i = first_task(); i < tasks; i += int64_t(gridDim.x) * kThreads) {
    int64_t t;
    const int64_t b = seqlen.divide(i, t);
    p.marks[i] = p.sequences.offsets ? packed_mark(p, t) : indexed_mark(p, b, t);
  }
}

// Thread: one number of a state.
__global__ __launch_bounds__(kThreads) void copy_kernel(const View<3> from, const View<3> to,
                                                        Divisor state, Divisor dim, int64_t tasks) {
  for (int64_t i = first_task(); i < tasks; i += int64_t(gridDim.x) * kThreads) {
    int64_t n, d;
    const int64_t slot = dim.divide(state.divide(i, n), d);
    auto at = [&](const View<3>& x) {
      return slot * x.stride[0] + d * x.stride[1] + n * x.stride[2];
    };
    const double x = from ? load_element<double>(from.data, from.dtype, at(from)) : 0.0;
    store_element(to.data, to.dtype, at(to), x);
  }
}

// Thread: one number of the result.
template <class R>
__global__ __launch_bounds__(kThreads) void sum_kernel(const R* partial, int64_t parts, View<4> out,
                                                       Divisor size1, Divisor size2, Divisor size3,
                                                       int64_t tasks) {
  for (int64_t i = first_task(); i < tasks; i += int64_t(gridDim.x) * kThreads) {
    R sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[part * tasks + i];
    int64_t x1, x2, x3;
    const int64_t x0 = size1.divide(size2.divide(size3.divide(i, x3), x2), x1);
    store_element(out.data, out.dtype,
                  x0 * out.stride[0] + x1 * out.stride[1] + x2 * out.stride[2] + x3 * out.stride[3],
                  sum);
  }
}

// 16 bytes of a tile of x at a time? `rows` and `steps` say whether there are neighbours to either
// side at all; `first` is what the first row of every tile is a multiple of.
Access access_of(const void* data, DType dtype, std::initializer_list<int64_t> outer,
                 int64_t row_stride, int64_t time_stride, int64_t rows, int64_t first) {
  const int64_t count = 16 / element_bytes(dtype);
  auto fits = [&](int64_t stride) { return stride % count == 0; };
  if (data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0 ||
      !std::all_of(outer.begin(), outer.end(), fits)) {
    return Access::kSingle;
  }
  if (time_stride == 1 && fits(row_stride)) return Access::kAlongTime;
  if (row_stride == 1 && fits(time_stride) && rows >= count && fits(first)) {
    return Access::kAlongRows;
  }
  return Access::kSingle;
}

}  // namespace

Access access_of(const View<3>& x, const Shape& p, int64_t repeat) {
  if (repeat != 1) return Access::kSingle;
  const int64_t batch_stride = p.batch == 1 ? 0 : x.stride[0];
  // Blocks of channels begin at multiples of at least 16 in their group.
  const int64_t first = p.groups == 1 ? 0 : p.group_dim();
  return access_of(x.data, x.dtype, {batch_stride}, x.stride[1], x.stride[2], p.dim, first);
}

void find_access(Inputs& p) {
  p.log2_operand_bytes = 1;
  for (Over over : {kU, kDelta, kZ, kDy}) {
    const int64_t bytes = p.over[over] ? element_bytes(p.over[over].dtype) : 2;
    p.log2_operand_bytes = std::max(p.log2_operand_bytes, bytes == 2 ? 1 : bytes == 4 ? 2 : 3);
    p.access[over] = access_of(p.over[over], p, over == kDelta ? p.delta_repeat : 1);
  }
  for (int i = 0; i < 2; ++i) {
    const View<4>& x = p.projection[i];
    const int64_t batch_stride = p.batch == 1 ? 0 : x.stride[0],
                  group_stride = p.groups == 1 ? 0 : x.stride[1];
    p.projection_access[i] = access_of(x.data, x.dtype, {batch_stride, group_stride}, x.stride[2],
                                       x.stride[3], p.state, 0);
  }
}

void find_marks(const Inputs& p, cudaStream_t stream) {
  if (p.marks == nullptr) return;
  if (p.sequences.ends != nullptr) find_run_ends(p.sequences, stream);
  const int64_t tasks = p.batch * p.seqlen;
  if (tasks == 0) return;
  launch("selective_scan marks", marks_kernel, blocks_for(tasks, kThreads), kThreads, 0, stream, p,
         Divisor(p.seqlen), tasks);
}

void copy_states(const View<3>& from, const View<3>& to, int64_t slots, int64_t dim, int64_t state,
                 cudaStream_t stream) {
  const int64_t tasks = slots * dim * state;
  if (tasks == 0) return;
  launch("selective_scan states", copy_kernel, blocks_for(tasks, kThreads), kThreads, 0, stream,
         from, to, Divisor(state), Divisor(dim), tasks);
}

void add_up(const void* partial, DType compute, int64_t parts, const int64_t (&size)[4],
            const View<4>& out, cudaStream_t stream) {
  const int64_t tasks = size[0] * size[1] * size[2] * size[3];
  if (tasks == 0) return;
  auto run = [&](auto* type) {
    using R = std::remove_pointer_t<decltype(type)>;
    launch("selective_scan sums", sum_kernel<R>, blocks_for(tasks, kThreads), kThreads, 0, stream,
           static_cast<const R*>(partial), parts, out, Divisor(size[1]), Divisor(size[2]),
           Divisor(size[3]), tasks);
  };
  compute == DType::kFloat64 ? run(static_cast<double*>(nullptr))
                             : run(static_cast<float*>(nullptr));
}

Plan plan(const Shape& p, bool all_states) {
  Plan plan{};
  plan.layout = p.compute == DType::kFloat64 || p.constant_B || p.constant_C || all_states
                    ? Layout::kAny
                    : (p.state == 1 ? Layout::kNarrow : Layout::kWide);
  int states = 1, threads = 0, kept = 0;
  with_layout<Wide>(plan.layout, p.compute, [&](auto config) {
    using C = decltype(config);
    plan.channels = C::kChannels, states = C::kStates, threads = C::kThreads, kept = C::kKept;
  });
  plan.channel_blocks = (p.group_dim() + plan.channels - 1) / plan.channels;
  plan.state_blocks = (p.state + states - 1) / states;
  // Two blocks to each of 132 multiprocessors keep them busy. Fewer: sequences are cut into parts of
  // at least 8 tiles, enough for four blocks each. It doubles the exponentials.
  const int64_t tasks = p.batch * p.groups * plan.channel_blocks;
  const int64_t tiles = (p.seqlen + kSteps - 1) / kSteps;
  plan.parts = 1;
  if (tasks > 0 && tasks < 2 * 132) {
    const int64_t wanted = (4 * 132 + tasks - 1) / tasks, most = tiles / 8;
    plan.parts = most < 1 ? 1 : wanted < most ? wanted : most;
  }
  plan.kept = plan.state_blocks > 1 ? tasks * plan.parts * plan.state_blocks * kept * threads : 0;
  return plan;
}

}  // namespace statescan::selective_scan::cuda
