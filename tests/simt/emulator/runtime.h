// The emulated machine: blocks of fibers on one host thread, what they wait for, and the checker that
// watches their accesses. A launch runs `resident` blocks at a time; which thread goes on where one
// stops is the schedule's choice.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "checker.h"
#include "simt.h"

namespace simt {

inline constexpr unsigned kLanes = 32, kMaxWarps = 32, kBarriers = 16;
inline constexpr size_t kStackBytes = 128 * 1024;

struct Block;

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, source_bytes;
  unsigned group;
};

// What a warp's thread has handed to the tensor cores.
struct Range {
  const char *begin, *end;
  bool holds(const void* p) const { return p >= begin && p < end; }
};

struct Thread : Place {
  Block* block = nullptr;
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  bool done = false;

  const char* waits_for = nullptr;
  Loc waits_at{};
  unsigned waits_mask = 0;

  // Of the warp operation that it takes part in.
  uint64_t in = 0, out = 0;
  int argument = 0, width = 0;
  void* collective_argument = nullptr;

  std::vector<AsyncCopy> copies;
  unsigned copy_group = 0;

  std::vector<Range> handed_over;  // registers, to wgmma
  int registers = 0;               // 0: as many as at launch
};

// A warp's share of a wgmma: its 16 of the 64 rows.
struct WarpProduct {
  unsigned group;
  bool complete, add;
  bool depth_first;  // b
  uint64_t a, b;     // operands in shared memory; of a only if ...
  bool a_is_shared;
  float a_registers[16][16];  // ... it is not in registers
  uint64_t version;           // of the operands when it began
  float* d[32];               // of each lane
  std::vector<float> sum;     // (lane, register), where no product before it has them
};

// What the four warps of a warpgroup multiply, which has to be the same.
struct GroupProduct {
  uint64_t a, b;
  bool a_is_shared, depth_first, add;
  bool operator==(const GroupProduct&) const = default;
};

// Lanes on their way to one warp operation. Several may be pending with different masks, which may
// overlap: half of a warp can wait for all of it while the other half shuffles among itself.
struct Gathering {
  unsigned mask, arrived;
  WarpOp op;
  WarpFunction function;
  Loc at;
};

struct Warp {
  unsigned live = 0, ready = 0;  // lanes
  std::vector<Gathering> pending;
  std::vector<WarpProduct> products;
  unsigned product_group = 0;
  size_t products_begun = 0;
};

struct Mbarrier {
  int count = 0, pending = 0;
  unsigned phase = 0;
  std::vector<uint32_t> arrived,
      complete;                      // what is known by arrivals, by those of complete phases
  unsigned waiting[kMaxWarps] = {};  // lanes of each warp
};

struct Barrier {
  int arrived = 0, expected = 0;
  unsigned present[kMaxWarps] = {}, waiting[kMaxWarps] = {};  // lanes of each warp
  Loc at[kMaxWarps] = {};
  int count = 0;
  bool all = true, any = false;
};

struct Block {
  unsigned serial = 0;  // unlike that of any other block since the process began
  int threads = 0, live = 0, warps = 0;
  unsigned ready_warps = 0;
  std::vector<Thread*> thread;
  Warp warp[kMaxWarps];
  Barrier barrier[kBarriers];
  Barrier finished[kBarriers];  // for the reductions: what was found when it was last complete
  std::map<const void*, Mbarrier> mbarrier;
  std::vector<GroupProduct> products[kMaxWarps / 4];  // of each warpgroup, in order
  std::vector<std::unique_ptr<SharedObject>> shared;  // the dynamic one first
  BlockClocks clocks;
};

// How threads take turns.
enum class Policy { kForward, kReverse, kRandom };
struct Schedule {
  Policy policy = Policy::kForward;
  unsigned seed = 0;
  int resident = 1;  // blocks
};
extern Schedule schedule;

inline Thread* self() { return static_cast<Thread*>(here); }

// "block (1,0,0) thread (33,0,0), warp 1 lane 1"
std::string describe(const Place& place);
std::string describe(Loc loc);

// scheduler.cpp
extern long shared_limit;     // bytes of shared memory that a block may have
extern std::string launched;  // names of kernels, a line each
void make_ready(Block& block, unsigned warp, unsigned lanes);
void wait_for(const char* what, Loc at, unsigned mask);  // until made ready
void maybe_switch();                                     // under a random schedule
void progress();                                         // not merely spinning

// warp.cpp, barrier.cpp: what may now be complete because a thread has returned
void lane_returned(Block& block, unsigned warp);
void thread_returned(Block& block);

// wgmma.cpp: what was not done by all of a warpgroup, of a block whose threads have returned; or null.
const char* done_by_some_warps(const Block& block);

// memory.cpp
SharedObject* new_shared(const void* key, size_t bytes);
void finish_copies(Thread& thread);

}  // namespace simt
