// What comes before the selective scan's walks: how a problem is dealt out.
#include "common/marks.cuh"
#include "selective_scan/tile.cuh"

namespace statescan::selective_scan::cuda {

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
  with_layout(plan.layout, p.compute, [&](auto config) {
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
