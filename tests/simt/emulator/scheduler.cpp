// Launches: blocks start, threads take turns, blocks end.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <random>
#include <stdexcept>

#include "fiber.h"
#include "runtime.h"

namespace simt {

Place* here = nullptr;
int processors = 132;  // an H100's
Schedule schedule;
long shared_limit = 227 * 1024;  // an H100's
std::string launched;

namespace {

struct Machine {
  void* host_stack_pointer = nullptr;
  std::vector<std::unique_ptr<Block>> resident;
  size_t turn = 0;  // the resident block whose threads run
  std::vector<std::unique_ptr<Block>> unused_blocks;
  std::vector<Thread*> unused_threads;
  std::mt19937 random;
  std::string report;  // empty: no fault
  unsigned long spins = 0, spin_limit = 0;
  void (*body)(void*) = nullptr;
  void* closure = nullptr;
};
Machine machine;

bool random_policy() { return schedule.policy == Policy::kRandom; }
unsigned draw(unsigned below) { return unsigned(machine.random() % below); }

unsigned lowest(unsigned bits) { return unsigned(__builtin_ctz(bits)); }
unsigned highest(unsigned bits) { return 31 - unsigned(__builtin_clz(bits)); }
unsigned any_of(unsigned bits) {
  for (unsigned skip = draw(unsigned(__builtin_popcount(bits))); skip > 0; --skip) bits &= bits - 1;
  return lowest(bits);
}
unsigned above(unsigned i) { return i >= 31 ? 0 : ~0u << (i + 1); }
unsigned below(unsigned i) { return (1u << i) - 1; }

void switch_to(Thread* next) {
  Thread* from = self();
  here = next;
  simt_switch(from ? &from->stack_pointer : &machine.host_stack_pointer,
              next ? next->stack_pointer : machine.host_stack_pointer);
}

// The next ready thread of `block` after `last` (null: none of this block). Lanes, warps and blocks
// rotate whatever the policy, so that a thread that spins starves nobody.
Thread* next_in(Block& block, const Thread* last) {
  if (block.ready_warps == 0) return nullptr;
  unsigned w, l;
  if (random_policy()) {
    w = any_of(block.ready_warps);
    l = any_of(block.warp[w].ready);
  } else if (schedule.policy == Policy::kForward) {
    unsigned later = last ? block.warp[last->warp].ready & above(last->lane) : 0;
    w = last ? last->warp : 0;
    if (later == 0) {
      const unsigned later_warps = last ? block.ready_warps & above(w) : 0;
      w = lowest(later_warps ? later_warps : block.ready_warps);
      later = block.warp[w].ready;
    }
    l = lowest(later);
  } else {
    unsigned earlier = last ? block.warp[last->warp].ready & below(last->lane) : 0;
    w = last ? last->warp : 0;
    if (earlier == 0) {
      const unsigned earlier_warps = last ? block.ready_warps & below(w) : 0;
      w = highest(earlier_warps ? earlier_warps : block.ready_warps);
      earlier = block.warp[w].ready;
    }
    l = highest(earlier);
  }
  return block.thread[w * kLanes + l];
}

Thread* next_thread(bool other_block) {
  const size_t blocks = machine.resident.size();
  if (blocks == 0) return nullptr;
  if (blocks > 1 && (other_block || (random_policy() && draw(64) == 0))) {
    machine.turn = random_policy() ? draw(unsigned(blocks)) : (machine.turn + 1) % blocks;
  }
  for (size_t i = 0; i < blocks; ++i) {
    const size_t at = (machine.turn + i) % blocks;
    Block& block = *machine.resident[at];
    const Thread* last = self() && self()->block == &block ? self() : nullptr;
    if (Thread* next = next_in(block, last)) {
      machine.turn = at;
      return next;
    }
  }
  return nullptr;
}

void not_ready(Thread& thread) {
  Warp& warp = thread.block->warp[thread.warp];
  warp.ready &= ~(1u << thread.lane);
  if (warp.ready == 0) thread.block->ready_warps &= ~(1u << thread.warp);
}

void leave() {
  Thread& thread = *self();
  Block& block = *thread.block;
  finish_copies(thread);
  thread.done = true;
  not_ready(thread);
  block.warp[thread.warp].live &= ~(1u << thread.lane);
  --block.live;
  progress();
  lane_returned(block, thread.warp);
  thread_returned(block);
  switch_to(block.live == 0 ? nullptr : next_thread(false));
}

void thread_main() {
  machine.body(machine.closure);
  leave();
}

Thread* take_thread() {
  if (machine.unused_threads.empty()) {
    auto* thread = new Thread;
    thread->stack = new_stack(kStackBytes);
    return thread;
  }
  Thread* thread = machine.unused_threads.back();
  machine.unused_threads.pop_back();
  return thread;
}

void start_thread(Block& block, unsigned linear, dim3 block_dim, dim3 grid, uint3 block_idx) {
  Thread* thread = take_thread();
  char* stack = thread->stack;
  *thread = Thread{};
  thread->stack = stack;
  thread->block = &block;
  thread->linear = linear, thread->warp = linear / kLanes, thread->lane = linear % kLanes;
  thread->thread_idx = {linear % block_dim.x, linear / block_dim.x % block_dim.y,
                        linear / (block_dim.x * block_dim.y)};
  thread->block_idx = block_idx, thread->block_dim = block_dim, thread->grid_dim = grid;
  thread->stack_pointer = start_of(stack, kStackBytes, linear, &thread_main);
  block.thread.push_back(thread);
}

std::unique_ptr<Block> start_block(unsigned index, dim3 grid, dim3 block_dim, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->threads = block->live = int(block_dim.x * block_dim.y * block_dim.z);
  block->warps = (block->threads + int(kLanes) - 1) / int(kLanes);
  block->serial = checker::first_block() + index;
  block->clocks.reset(block->threads);
  block->shared.emplace_back(new_shared(nullptr, shared_bytes));
  const uint3 block_idx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
  for (int i = 0; i < block->threads; ++i) {
    start_thread(*block, unsigned(i), block_dim, grid, block_idx);
    const Thread& thread = *block->thread.back();
    block->warp[thread.warp].live |= 1u << thread.lane;
    make_ready(*block, thread.warp, 1u << thread.lane);
  }
  return block;
}

void end_block(size_t at) {
  if (const char* fault = done_by_some_warps(*machine.resident[at]);
      fault && machine.report.empty()) {
    machine.report = fault;
  }
  for (Thread* thread : machine.resident[at]->thread) machine.unused_threads.push_back(thread);
  machine.resident.erase(machine.resident.begin() + long(at));
}

std::string deadlock() {
  std::string text = "deadlock: no thread can go on";
  int blocked = 0;
  for (const auto& block : machine.resident) {
    for (const Thread* thread : block->thread) {
      if (thread->done || ++blocked > 6) continue;
      char mask[16];
      snprintf(mask, sizeof(mask), "%08x", thread->waits_mask);
      text += "\n  " + describe(*thread) + " waits for " + thread->waits_for + " at " +
              describe(thread->waits_at) + ", mask " + mask;
    }
  }
  return text + "\n  " + std::to_string(blocked) + " threads wait in all";
}

// The order in which blocks start.
std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  if (schedule.policy == Policy::kReverse) std::reverse(order.begin(), order.end());
  if (random_policy()) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

void run_blocks(const std::vector<unsigned>& order, dim3 grid, dim3 block_dim,
                size_t shared_bytes) {
  size_t started = 0;
  while (machine.report.empty()) {
    while (machine.resident.size() < size_t(schedule.resident) && started < order.size()) {
      machine.resident.push_back(start_block(order[started++], grid, block_dim, shared_bytes));
    }
    if (machine.resident.empty()) return;
    Thread* next = next_thread(false);
    if (next == nullptr) {
      machine.report = deadlock();
      return;
    }
    switch_to(next);
    for (size_t i = machine.resident.size(); i-- > 0;) {
      if (machine.resident[i]->live == 0) end_block(i);
    }
    machine.turn = 0;
  }
}

const char* launch_error(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return "no such block size";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "an empty grid";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "the grid is too large";
  if (shared_bytes > size_t(shared_limit)) return "more shared memory than a block may have";
  return nullptr;
}

}  // namespace

long shared_of_block() { return shared_limit; }

std::string describe(const Place& p) {
  char text[160];
  snprintf(text, sizeof(text), "block (%u,%u,%u) thread (%u,%u,%u), warp %u lane %u", p.block_idx.x,
           p.block_idx.y, p.block_idx.z, p.thread_idx.x, p.thread_idx.y, p.thread_idx.z, p.warp,
           p.lane);
  return text;
}

std::string describe(Loc loc) {
  return loc.file ? loc.file + (":" + std::to_string(loc.line)) : "an unknown place";
}

void make_ready(Block& block, unsigned warp, unsigned lanes) {
  if (lanes == 0) return;
  block.warp[warp].ready |= lanes;
  block.ready_warps |= 1u << warp;
}

void wait_for(const char* what, Loc at, unsigned mask) {
  Thread& thread = *self();
  thread.waits_for = what, thread.waits_at = at, thread.waits_mask = mask;
  not_ready(thread);
  switch_to(next_thread(false));  // null: the host finds the deadlock
  thread.waits_for = nullptr;
}

void maybe_switch() {
  if (!random_policy() || draw(2) == 0) return;
  Thread* next = next_thread(false);
  if (next && next != self()) switch_to(next);
}

void progress() { machine.spins = 0; }

void yield(bool spinning) {
  if (here == nullptr) return;
  if (!spinning) {
    progress();
    maybe_switch();
    return;
  }
  if (++machine.spins > machine.spin_limit) {
    fail("livelock: all threads wait for flags that nobody sets (a block that is not resident?)");
  }
  Thread* next = next_thread(true);
  if (next && next != self()) switch_to(next);
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  machine.report = std::string(text) + "\n  in " + describe(*here);
  switch_to(nullptr);
  __builtin_unreachable();
}

void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
         void* closure) {
  if (const char* error = launch_error(grid, block, shared_bytes)) {
    throw std::runtime_error(std::string("simt: ") + name + ": " + error);
  }
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (blocks > 1u << 22) throw std::runtime_error("simt: a grid too large to be emulated");
  launched += std::string(name) + "\n";
  checker::begin_launch(unsigned(blocks));
  machine.random.seed(schedule.seed);
  machine.body = body, machine.closure = closure;
  machine.report.clear();
  machine.spins = 0, machine.turn = 0;
  machine.spin_limit = 20000 + 200ul * block.x * block.y * block.z * unsigned(schedule.resident);
  run_blocks(block_order(unsigned(blocks)), grid, block, shared_bytes);
  while (!machine.resident.empty()) end_block(0);
  here = nullptr;
  if (!machine.report.empty()) {
    throw std::runtime_error(std::string("simt: ") + name + ": " + machine.report);
  }
}

}  // namespace simt
