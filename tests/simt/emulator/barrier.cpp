// Barriers of a block: number 0 for all of its threads, the others for as many as they are told.
#include "runtime.h"

namespace simt {
namespace {

void complete(Block& block, int id) {
  Barrier& barrier = block.barrier[id];
  bool all_wait = true;
  for (int w = 0; w < block.warps; ++w) {
    all_wait &= barrier.waiting[w] == block.warp[w].live;
    all_wait &= barrier.waiting[w] == barrier.present[w];
  }
  if (all_wait) {
    block.clocks.sync_block(barrier.waiting);
  } else {
    block.clocks.sync_warps(barrier.present, barrier.waiting);
  }
  for (int w = 0; w < block.warps; ++w) make_ready(block, unsigned(w), barrier.waiting[w]);
  block.finished[id] = barrier;
  barrier = Barrier{};
  progress();
}

}  // namespace

void thread_returned(Block& block) {
  const Barrier& barrier = block.barrier[0];
  if (block.live > 0 && barrier.arrived > 0 && barrier.arrived == block.live) complete(block, 0);
}

int block_barrier(int id, int count, bool wait, Reduce reduce, int predicate, Loc loc) {
  Thread& thread = *self();
  Block& block = *thread.block;
  if (id < 0 || id >= int(kBarriers)) fail("%s: there is no barrier %d", describe(loc).c_str(), id);
  Barrier& barrier = block.barrier[id];
  const int expected = count > 0 ? count : block.live;
  if (count > 0 && count % int(kLanes) != 0) {
    fail("%s: barrier %d wants whole warps, got %d threads", describe(loc).c_str(), id, count);
  }
  if (count > 0 && barrier.arrived > 0 && barrier.expected != expected) {
    fail("%s: barrier %d is for %d threads here, for %d elsewhere", describe(loc).c_str(), id,
         expected, barrier.expected);
  }
  Loc& first = barrier.at[thread.warp];
  if (barrier.present[thread.warp] != 0 && (first.line != loc.line || first.file != loc.file)) {
    fail("divergent barrier: this thread is at %s, others of its warp at %s", describe(loc).c_str(),
         describe(first).c_str());
  }
  first = loc;
  barrier.expected = expected;
  ++barrier.arrived;
  barrier.present[thread.warp] |= 1u << thread.lane;
  if (wait) barrier.waiting[thread.warp] |= 1u << thread.lane;
  barrier.count += predicate != 0;
  barrier.all &= predicate != 0;
  barrier.any |= predicate != 0;
  if (barrier.arrived == expected) {
    complete(block, id);
    if (wait) maybe_switch();
  } else if (wait) {
    wait_for("a barrier of the block", loc, ~0u);
  }
  const Barrier& found = block.finished[id];
  return reduce == Reduce::kCount ? found.count : reduce == Reduce::kAnd ? found.all : found.any;
}

}  // namespace simt
