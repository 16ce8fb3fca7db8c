// The happens-before checker. Kernel sources are compiled with -fsanitize=thread, which calls
// __tsan_read4(p) and the like before each access; those functions are ours (instrumented.cpp) and end
// here. Each two bytes of shared and global memory have a cell with their last write and two reads.
// An access must come after all conflicting ones by program order, barriers, __syncwarp, fences and
// atomics, whatever the schedule that happened to run; it must be within one buffer, and what it
// reads of shared memory must have been written by its block.
//
// Who knows of whose past: thread u of a block has a clock, which ticks when others may learn of it.
// An access is known to thread t if its clock is at most what t knows of u's clock, by way of
//   - the block's last full barrier               (at_barrier[u])
//   - __syncwarp, lane by lane                    (by_lane)
//   - barriers of some warps                      (by_warp)
//   - mbarriers                                   (by_thread)
//   - release and acquire, in other blocks too    (Knowledge)
// Atomics do not conflict with each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace simt {

enum AccessKind : uint16_t {
  kPlain = 0,
  kAtomic = 1,
  kInFlight = 2,
  kLanding = 4,
  kAsyncProxy = 8,  // of wgmma: sees what its writers have made known by fence.proxy.async
};

struct Access {
  uint32_t block = 0;  // serial; 0: there was none
  uint32_t clock = 0, epoch = 0, pc = 0;
  uint16_t thread = 0, kind = 0;
};

struct Cell {
  Access write, read[2];
};
inline constexpr size_t kCellBytes = 2;  // neighbouring 16-bit elements are apart

// A block's object in shared memory, between red zones.
struct SharedObject {
  const void* key;
  char* data;
  size_t bytes;
  std::vector<Cell> cells;
  size_t arena_bytes;
  ~SharedObject();
};

// What is known of a block: everything before its `epoch`-th full barrier, and clocks of threads.
struct Known {
  uint32_t epoch = 0;
  std::map<uint16_t, uint32_t> clock;
};
using Knowledge = std::map<uint32_t, Known>;  // by serial of the block
using SharedKnowledge = std::shared_ptr<const Knowledge>;

struct BlockClocks {
  int threads = 0;
  uint32_t epoch = 1;
  bool across = false;  // some thread knows of other blocks
  std::vector<uint32_t> clock, at_barrier;
  std::vector<uint32_t> by_lane;    // (warp, lane, lane)
  std::vector<uint32_t> by_warp;    // (warp, thread), empty before a barrier of some warps
  std::vector<uint32_t> by_thread;  // (thread, thread), empty before a wait for an mbarrier
  std::vector<uint32_t> proxied;    // up to which clock a thread's writes are known to wgmma
  std::vector<SharedKnowledge> known;
  std::vector<SharedKnowledge> fenced;    // at the last fence: what a relaxed store then publishes
  std::vector<SharedKnowledge> glimpsed;  // by relaxed loads: known after the next fence

  void reset(int count);
  void sync_block(const unsigned* lanes);  // lanes of each warp that wait
  void sync_warps(const unsigned* present, const unsigned* waiting);
  void sync_lanes(unsigned warp, unsigned lanes);

  // All that thread t knows of the block joins `past`, and the other way round.
  void tell(size_t t, std::vector<uint32_t>& past);
  void learn(size_t t, const std::vector<uint32_t>& past);

 private:
  void share_knowledge(const unsigned* present, const unsigned* waiting);
};

namespace checker {

void begin_launch(unsigned blocks);
uint32_t first_block();  // serial of the launch's first block

// An access of the running thread. `pc`: of the instruction, less the library's address.
void access(const void* p, size_t bytes, bool write, unsigned kind, uint32_t pc);
void atomic(const void* p, size_t bytes, bool write, bool acquire, bool release, uint32_t pc);
void fence();
void fence_proxy_async();
// wgmma reads 16 bytes of shared memory at each of these places. The result is another number after
// another write.
uint64_t read_operands(const std::vector<const char*>& pieces);
// An access of host code: a fault if it is to device memory.
void host_access(const void* p, size_t bytes, bool write, uint32_t pc);

uint32_t pc_of(const void* return_address);

}  // namespace checker

// Device memory. Overlapping buffers become one. Host code gets at it by copying only.
void add_buffer(const void* data, size_t bytes);
void remove_buffer(const void* data);
void forget_buffers();
void copy_device_memory(void* to, const void* from, size_t bytes);
// The first fault of host code since the last call, or empty.
std::string take_host_fault();

}  // namespace simt
