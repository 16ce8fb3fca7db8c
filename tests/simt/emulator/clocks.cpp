// How barriers pass on who knows of whose past.
#include <algorithm>

#include "runtime.h"

namespace simt {
namespace {

// f(warp, thread) for the named lanes of each warp.
template <class F>
void each_thread(int threads, const unsigned* lanes, F f) {
  for (int w = 0; w * int(kLanes) < threads; ++w) {
    for (unsigned m = lanes[w]; m != 0; m &= m - 1) {
      f(size_t(w), size_t(w) * kLanes + size_t(__builtin_ctz(m)));
    }
  }
}

void join(Knowledge& into, const Knowledge& from) {
  for (const auto& [block, theirs] : from) {
    Known& ours = into[block];
    ours.epoch = std::max(ours.epoch, theirs.epoch);
    for (const auto& [thread, clock] : theirs.clock) {
      uint32_t& known = ours.clock[thread];
      known = std::max(known, clock);
    }
  }
}

}  // namespace

void BlockClocks::reset(int count) {
  *this = BlockClocks{};
  threads = count;
  clock.assign(size_t(count), 1);
  at_barrier.assign(size_t(count), 0);
  proxied.assign(size_t(count), 0);
  by_lane.assign(size_t(count + 31) / kLanes * kLanes * kLanes, 0);
  known.resize(size_t(count)), fenced.resize(size_t(count)), glimpsed.resize(size_t(count));
}

void BlockClocks::share_knowledge(const unsigned* present, const unsigned* waiting) {
  if (!across) return;
  auto all = std::make_shared<Knowledge>();
  each_thread(threads, present, [&](size_t, size_t t) {
    if (known[t]) join(*all, *known[t]);
  });
  each_thread(threads, waiting, [&](size_t, size_t t) {
    auto more = all;
    if (known[t] && present != waiting) {  // its own stays, if it only waited
      more = std::make_shared<Knowledge>(*all);
      join(*more, *known[t]);
    }
    known[t] = more;
  });
}

void BlockClocks::sync_block(const unsigned* lanes) {
  each_thread(threads, lanes, [&](size_t, size_t t) { at_barrier[t] = clock[t]++; });
  ++epoch;
  share_knowledge(lanes, lanes);
}

void BlockClocks::sync_warps(const unsigned* present, const unsigned* waiting) {
  const size_t n = size_t(threads), warps = (n + kLanes - 1) / kLanes;
  if (by_warp.empty()) by_warp.assign(warps * n, 0);
  std::vector<uint32_t> joint(n, 0);
  for (size_t w = 0; w < warps; ++w) {
    for (size_t u = 0; present[w] != 0 && u < n; ++u) {
      joint[u] = std::max(joint[u], by_warp[w * n + u]);
    }
  }
  each_thread(threads, present, [&](size_t, size_t t) {
    for (size_t u = 0; !by_thread.empty() && u < n; ++u) {
      joint[u] = std::max(joint[u], by_thread[t * n + u]);
    }
  });
  each_thread(threads, present, [&](size_t, size_t t) { joint[t] = clock[t]++; });
  for (size_t w = 0; w < warps; ++w) {
    for (size_t u = 0; waiting[w] != 0 && u < n; ++u) {
      by_warp[w * n + u] = std::max(by_warp[w * n + u], joint[u]);
    }
  }
  share_knowledge(present, waiting);
}

void BlockClocks::sync_lanes(unsigned warp, unsigned lanes) {
  uint32_t* seen = &by_lane[size_t(warp) * kLanes * kLanes];
  unsigned only_here[kMaxWarps] = {};
  only_here[warp] = lanes;
  uint32_t joint[kLanes] = {};
  each_thread(threads, only_here, [&](size_t, size_t t) {
    for (size_t u = 0; u < kLanes; ++u)
      joint[u] = std::max(joint[u], seen[t % kLanes * kLanes + u]);
  });
  each_thread(threads, only_here, [&](size_t, size_t t) { joint[t % kLanes] = clock[t]++; });
  each_thread(threads, only_here, [&](size_t, size_t t) {
    std::copy(joint, joint + kLanes, seen + t % kLanes * kLanes);
  });
  if (!by_thread.empty()) {
    std::vector<uint32_t> past(size_t(threads), 0);
    each_thread(threads, only_here, [&](size_t, size_t t) { tell(t, past); });
    each_thread(threads, only_here, [&](size_t, size_t t) { learn(t, past); });
  }
  share_knowledge(only_here, only_here);
}

void BlockClocks::tell(size_t t, std::vector<uint32_t>& past) {
  const size_t n = size_t(threads), first = t / kLanes * kLanes;
  for (size_t u = 0; u < n; ++u) {
    uint32_t known = at_barrier[u];
    if (!by_warp.empty()) known = std::max(known, by_warp[t / kLanes * n + u]);
    if (!by_thread.empty()) known = std::max(known, by_thread[t * n + u]);
    if (u >= first && u < first + kLanes) known = std::max(known, by_lane[t * kLanes + u - first]);
    past[u] = std::max(past[u], known);
  }
  past[t] = std::max(past[t], clock[t]++);
}

void BlockClocks::learn(size_t t, const std::vector<uint32_t>& past) {
  const size_t n = size_t(threads);
  if (by_thread.empty()) by_thread.assign(n * n, 0);
  for (size_t u = 0; u < n; ++u) {
    by_thread[t * n + u] = std::max(by_thread[t * n + u], past[u]);
  }
}

// ---- release and acquire

namespace {

std::map<const void*, Knowledge> published;  // by address of the atomic

// Everything that thread t of the block knows now, itself included.
SharedKnowledge snapshot(BlockClocks& c, uint32_t block, size_t t) {
  auto all = std::make_shared<Knowledge>();
  if (c.known[t]) *all = *c.known[t];
  Known& own = (*all)[block];
  own.epoch = std::max(own.epoch, c.epoch);
  auto learn = [&](size_t thread, uint32_t clock) {
    uint32_t& known = own.clock[uint16_t(thread)];
    known = std::max(known, clock);
  };
  const size_t n = size_t(c.threads), warp = t / kLanes;
  for (size_t u = 0; u < kLanes && warp * kLanes + u < n; ++u) {
    learn(warp * kLanes + u, c.by_lane[t * kLanes + u]);
  }
  for (size_t u = 0; !c.by_warp.empty() && u < n; ++u) learn(u, c.by_warp[warp * n + u]);
  learn(t, c.clock[t]++);
  return all;
}

void learn(BlockClocks& c, size_t t, const Knowledge& more) {
  auto all = std::make_shared<Knowledge>();
  if (c.known[t]) *all = *c.known[t];
  join(*all, more);
  c.known[t] = all;
  c.across = true;
}

}  // namespace

namespace checker {

void forget_published() { published.clear(); }

void fence() {
  Thread& thread = *self();
  BlockClocks& c = thread.block->clocks;
  const size_t t = thread.linear;
  if (c.glimpsed[t]) learn(c, t, *c.glimpsed[t]);
  c.glimpsed[t] = nullptr;
  c.fenced[t] = snapshot(c, thread.block->serial, t);
}

void fence_proxy_async() {
  Thread& thread = *self();
  BlockClocks& c = thread.block->clocks;
  c.proxied[thread.linear] = c.clock[thread.linear]++;
}

void atomic(const void* p, size_t bytes, bool write, bool acquire, bool release, uint32_t pc) {
  Thread& thread = *self();
  BlockClocks& c = thread.block->clocks;
  const size_t t = thread.linear;
  access(p, bytes, write, kAtomic, pc);
  const auto found = published.find(p);
  if (found != published.end()) {
    if (acquire) {
      learn(c, t, found->second);
    } else {
      auto seen = std::make_shared<Knowledge>(found->second);
      if (c.glimpsed[t]) join(*seen, *c.glimpsed[t]);
      c.glimpsed[t] = seen;
    }
  }
  if (!write) return;
  if (release) {
    join(published[p], *snapshot(c, thread.block->serial, t));
  } else if (c.fenced[t]) {
    join(published[p], *c.fenced[t]);
  }
}

}  // namespace checker

void fence() {
  if (here != nullptr) checker::fence();
}

}  // namespace simt
