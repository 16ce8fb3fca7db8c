// What comes before the selective scan's walks: how a problem is dealt out, and how tiles are read.
#include <algorithm>
#include <initializer_list>

#include "common/marks.cuh"
#include "selective_scan/tile.cuh"

namespace statescan::selective_scan::cuda {
namespace {

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
  statescan::find_marks(p.sequences, p.slots_per_row, p.reverse, p.marks, stream);
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
