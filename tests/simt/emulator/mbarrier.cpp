// What warps of a block wait for besides its barriers: mbarriers, which they arrive at and wait for
// phase by phase, and registers that others have to give back.
#include <algorithm>

#include "ptx90_twins.h"
#include "runtime.h"

namespace statescan::ptx {
namespace {

using simt::Mbarrier;

Mbarrier& find(uint64_t* barrier, simt::Loc loc) {
  auto& known = simt::self()->block->mbarrier;
  const auto found = known.find(barrier);
  if (found == known.end()) {
    simt::fail("%s: an mbarrier that nobody has initialised", simt::describe(loc).c_str());
  }
  simt::checker::access(barrier, sizeof(*barrier), false, simt::kAtomic, 0);
  return found->second;
}

void complete(simt::Block& block, Mbarrier& barrier) {
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
  barrier.complete = barrier.arrived;
  for (int w = 0; w < block.warps; ++w) {
    simt::make_ready(block, unsigned(w), barrier.waiting[w]);
    barrier.waiting[w] = 0;
  }
}

// Of a thread at launch, if the block has a processor to itself.
int registers_at_launch(const simt::Block& block) {
  return std::min(256, 65536 / block.threads / 8 * 8);
}

}  // namespace

void have_registers(int count) {
  simt::Thread& own = *simt::self();
  simt::Block& block = *own.block;
  const int at_launch = registers_at_launch(block);
  auto others = [&] {
    int sum = 0;
    for (const simt::Thread* t : block.thread) sum += t->registers ? t->registers : at_launch;
    return sum - (own.registers ? own.registers : at_launch);
  };
  while (others() + count > at_launch * block.threads) simt::yield(true);
  own.registers = count;
}

void mbarrier_init(uint64_t* barrier, int count, simt::Loc loc) {
  simt::Block& block = *simt::self()->block;
  simt::check_shared(barrier);
  simt::check_access(barrier, sizeof(*barrier), true);
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0 || count < 1) {
    simt::fail("%s: an mbarrier is 8 bytes for at least one thread", simt::describe(loc).c_str());
  }
  Mbarrier& x = block.mbarrier[barrier] = Mbarrier{};
  x.count = x.pending = count;
  x.arrived.assign(size_t(block.threads), 0);
}

void mbarrier_arrive(uint64_t* barrier, simt::Loc loc) {
  simt::Thread& thread = *simt::self();
  Mbarrier& x = find(barrier, loc);
  thread.block->clocks.tell(thread.linear, x.arrived);
  if (--x.pending == 0) complete(*thread.block, x);
  simt::yield(false);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity, simt::Loc loc) {
  simt::Thread& thread = *simt::self();
  Mbarrier& x = find(barrier, loc);
  while (x.phase == (parity & 1)) {
    x.waiting[thread.warp] |= 1u << thread.lane;
    simt::wait_for("an mbarrier", loc, ~0u);
  }
  // Before the first phase is complete there is nothing to learn.
  if (!x.complete.empty()) thread.block->clocks.learn(thread.linear, x.complete);
  simt::maybe_switch();
}

}  // namespace statescan::ptx
