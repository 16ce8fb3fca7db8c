// Operations that lanes of a warp do together.
#include "runtime.h"

namespace simt {
namespace {

const char* name_of(WarpOp op) {
  static const char* const names[] = {
      "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync",
      "__any_sync",  "__all_sync",     "__match_any_sync", "__syncwarp",      "a warp collective"};
  return names[int(op)];
}

template <class F>
void each_lane(unsigned lanes, F f) {
  for (; lanes != 0; lanes &= lanes - 1) f(unsigned(__builtin_ctz(lanes)));
}

// The lane whose value `lane` gets; its own where CUDA says that nothing is shuffled in.
unsigned source_lane(WarpOp op, unsigned lane, int argument, int width) {
  const int begin = int(lane) & ~(width - 1), end = begin + width;
  int from = 0;
  switch (op) {
    case WarpOp::kIndex: return unsigned(begin + (argument & (width - 1)));
    case WarpOp::kUp: from = int(lane) - argument; break;
    case WarpOp::kDown: from = int(lane) + argument; break;
    default: from = int(lane) ^ argument; return from < end ? unsigned(from) : lane;
  }
  return from >= begin && from < end ? unsigned(from) : lane;
}

void shuffle_lanes(const Gathering& g, Thread* const* thread) {
  each_lane(g.arrived, [&](unsigned lane) {
    Thread& t = *thread[lane];
    const unsigned from = source_lane(g.op, lane, t.argument, t.width);
    if ((g.arrived >> from & 1) == 0) {
      here = &t;
      fail("%s: %s reads lane %u, which takes no part (mask %08x)", describe(g.at).c_str(),
           name_of(g.op), from, g.mask);
    }
    t.out = thread[from]->in;
  });
}

void vote(const Gathering& g, Thread* const* thread) {
  unsigned yes = 0;
  each_lane(g.arrived, [&](unsigned lane) { yes |= unsigned(thread[lane]->in != 0) << lane; });
  const uint64_t result = g.op == WarpOp::kBallot ? yes
                          : g.op == WarpOp::kAny  ? yes != 0
                                                  : yes == g.arrived;
  each_lane(g.arrived, [&](unsigned lane) { thread[lane]->out = result; });
}

void match(const Gathering& g, Thread* const* thread) {
  each_lane(g.arrived, [&](unsigned lane) {
    unsigned equal = 0;
    each_lane(g.arrived, [&](unsigned other) {
      equal |= unsigned(thread[other]->in == thread[lane]->in) << other;
    });
    thread[lane]->out = equal;
  });
}

void complete(Block& block, unsigned warp, size_t at) {
  const Gathering g = block.warp[warp].pending[at];
  block.warp[warp].pending.erase(block.warp[warp].pending.begin() + long(at));
  Thread* const* thread = &block.thread[warp * kLanes];
  switch (g.op) {
    case WarpOp::kIndex:
    case WarpOp::kUp:
    case WarpOp::kDown:
    case WarpOp::kXor: shuffle_lanes(g, thread); break;
    case WarpOp::kBallot:
    case WarpOp::kAny:
    case WarpOp::kAll: vote(g, thread); break;
    case WarpOp::kMatch: match(g, thread); break;
    case WarpOp::kSync: block.clocks.sync_lanes(warp, g.arrived); break;
    case WarpOp::kCollective: {
      void* arguments[kLanes] = {};
      each_lane(g.arrived, [&](unsigned l) { arguments[l] = thread[l]->collective_argument; });
      g.function(arguments);
    }
  }
  make_ready(block, warp, g.arrived);
}

bool same_place(Loc a, Loc b) { return a.line == b.line && a.file == b.file; }

// The gathering with this mask, begun if there is none.
size_t find(Warp& warp, const Gathering& wanted) {
  for (size_t i = 0; i < warp.pending.size(); ++i) {
    const Gathering& g = warp.pending[i];
    if (g.mask != wanted.mask) continue;
    if (g.op != wanted.op || g.function != wanted.function || !same_place(g.at, wanted.at)) {
      fail("lanes of one mask (%08x) are in different warp operations: %s at %s and %s at %s",
           g.mask, name_of(wanted.op), describe(wanted.at).c_str(), name_of(g.op),
           describe(g.at).c_str());
    }
    return i;
  }
  warp.pending.push_back(wanted);
  return warp.pending.size() - 1;
}

void join(WarpOp op, unsigned mask, WarpFunction function, const char* name, Loc at) {
  Thread& thread = *self();
  Warp& warp = thread.block->warp[thread.warp];
  const unsigned lane = 1u << thread.lane;
  if ((mask & lane) == 0) {
    fail("%s: %s: lane %u is not in its own mask %08x", describe(at).c_str(), name, thread.lane,
         mask);
  }
  const size_t i = find(warp, {mask, 0, op, function, at});
  warp.pending[i].arrived |= lane;
  if (warp.pending[i].arrived == (mask & warp.live)) {
    complete(*thread.block, thread.warp, i);
    progress();
    maybe_switch();
  } else {
    wait_for(name, at, mask);
  }
}

}  // namespace

void lane_returned(Block& block, unsigned w) {
  Warp& warp = block.warp[w];
  for (size_t i = warp.pending.size(); i-- > 0;) {
    if (warp.pending[i].arrived == (warp.pending[i].mask & warp.live)) complete(block, w, i);
  }
}

uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t in, int argument, int width, Loc loc) {
  Thread& thread = *self();
  thread.in = in, thread.argument = argument, thread.width = width;
  join(op, mask, nullptr, name_of(op), loc);
  return thread.out;
}

void warp_collective(WarpFunction f, const char* name, unsigned mask, void* argument, Loc loc) {
  self()->collective_argument = argument;
  join(WarpOp::kCollective, mask, f, name, loc);
}

}  // namespace simt
