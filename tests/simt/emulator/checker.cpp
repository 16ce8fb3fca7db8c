// Accesses: which memory they are to, whether they are within it, whether they are ordered.
#include "checker.h"

#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "runtime.h"

namespace simt {
namespace {

struct Buffer {
  size_t bytes;
  std::vector<Cell> cells;
};
std::map<uintptr_t, Buffer> buffers;  // by address
std::string host_fault;

uint32_t launch_begin = 1, next_serial = 1;

struct Span {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t p) const { return p >= begin && p < end; }
};
Span host_stack;
Span library;  // the one of the kernels that run

// The span of the loaded library that holds an address.
Span library_of(uintptr_t address) {
  std::pair<uintptr_t, Span> search{address, {}};
  auto visit = [](dl_phdr_info* info, size_t, void* data) {
    auto& [wanted, found] = *static_cast<std::pair<uintptr_t, Span>*>(data);
    Span span{~uintptr_t(0), 0};
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type != PT_LOAD) continue;
      span.begin = std::min<uintptr_t>(span.begin, info->dlpi_addr + header.p_vaddr);
      span.end = std::max<uintptr_t>(span.end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    }
    if (span.holds(wanted)) found = span;
    return int(span.holds(wanted));
  };
  dl_iterate_phdr(visit, &search);
  return search.second;
}

void find_host_stack() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &begin, &bytes);
  pthread_attr_destroy(&attributes);
  host_stack = {reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes};
}

// ---- order

bool before_in_block(const BlockClocks& c, const Access& a, size_t t) {
  const size_t u = a.thread, n = size_t(c.threads);
  if (u == t || a.clock <= c.at_barrier[u]) return true;
  if (u / kLanes == t / kLanes && a.clock <= c.by_lane[t * kLanes + u % kLanes]) return true;
  if (!c.by_warp.empty() && a.clock <= c.by_warp[t / kLanes * n + u]) return true;
  return !c.by_thread.empty() && a.clock <= c.by_thread[t * n + u];
}

// Did `a` happen before what thread t of the block does now?
bool before(const Block& block, const Access& a, size_t t) {
  if (a.block == block.serial && before_in_block(block.clocks, a, t)) return true;
  const SharedKnowledge& known = block.clocks.known[t];
  if (!known) return false;
  const auto of_block = known->find(a.block);
  if (of_block == known->end()) return false;
  if (a.epoch < of_block->second.epoch) return true;
  const auto clock = of_block->second.clock.find(a.thread);
  return clock != of_block->second.clock.end() && a.clock <= clock->second;
}

const char* verb(bool write) { return write ? "write" : "read"; }

struct Where {
  const char* space;
  size_t offset;
};

[[noreturn]] void race(Where where, const Access& earlier, bool earlier_write, bool write,
                       uint32_t pc) {
  fail(
      "data race on %s memory at byte %zu: %s at pc:0x%x, %s%s by thread %u of block %u of the "
      "grid at pc:0x%x, and nothing orders them",
      where.space, where.offset, verb(write), pc,
      earlier.kind & kInFlight ? "un-waited cp.async " : "", verb(earlier_write), earlier.thread,
      earlier.block - launch_begin, earlier.pc);
}

class Touch {
 public:
  Touch(bool write, unsigned kind, uint32_t pc, const char* space, bool shared)
      : thread_(*self()), block_(*thread_.block), write_(write), space_(space), shared_(shared) {
    me_.block = block_.serial, me_.clock = block_.clocks.clock[thread_.linear];
    me_.epoch = block_.clocks.epoch, me_.pc = pc;
    me_.thread = uint16_t(thread_.linear), me_.kind = uint16_t(kind);
  }

  void operator()(Cell& cell, size_t offset) {
    const bool written = current(cell.write);
    if (shared_ && !write_ && !written) {
      fail(
          "read of uninitialised shared memory at byte %zu, pc:0x%x: no thread of the block "
          "has written it",
          offset, me_.pc);
    }
    if (written && (conflicts(cell.write) || hidden(cell.write))) {
      race({space_, offset}, cell.write, true, write_, me_.pc);
    }
    if (shared_ && (me_.kind & kAsyncProxy)) {
      const Access& last = cell.write;
      if (last.clock > block_.clocks.proxied[last.thread]) {
        fail(
            "wgmma reads byte %zu of shared memory, which thread %u has written at pc:0x%x, "
            "without "
            "a fence.proxy.async of that thread",
            offset, last.thread, last.pc);
      }
    }
    if (write_) {
      for (const Access& read : cell.read) {
        if (current(read) && conflicts(read)) race({space_, offset}, read, false, true, me_.pc);
      }
      cell.write = me_;
      cell.read[0] = cell.read[1] = Access{};
    } else {
      remember(cell);
    }
  }

 private:
  // Of this block (shared memory), of this launch (global): all else has long ended.
  bool current(const Access& a) const {
    return shared_ ? a.block == block_.serial : a.block >= launch_begin;
  }
  bool conflicts(const Access& a) const {
    return !(a.kind & me_.kind & kAtomic) && !before(block_, a, thread_.linear);
  }
  // Being written by a copy that nobody has waited for.
  bool hidden(const Access& a) const {
    return (a.kind & kInFlight) && !(me_.kind & (kInFlight | kLanding));
  }
  // A read that comes before this one need not be kept; of three the odd one out is forgotten.
  void remember(Cell& cell) {
    for (Access& read : cell.read) {
      if (!current(read) || before(block_, read, thread_.linear)) {
        read = me_;
        return;
      }
    }
    cell.read[me_.clock & 1] = me_;
  }

  Thread& thread_;
  Block& block_;
  Access me_;
  bool write_;
  const char* space_;
  bool shared_;
};

void touch(std::vector<Cell>& cells, size_t bytes_of_all, size_t offset, size_t bytes, Touch t) {
  if (cells.empty()) cells.resize(bytes_of_all / kCellBytes + 1);
  for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    t(cells[i], i * kCellBytes);
  }
}

// ---- memory

SharedObject* shared_near(const Block& block, uintptr_t p) {
  constexpr uintptr_t kNear = 4096;  // the red zone
  for (const auto& object : block.shared) {
    const auto begin = reinterpret_cast<uintptr_t>(object->data);
    if (p >= begin - kNear && p < begin + object->bytes + kNear) return object.get();
  }
  return nullptr;
}

[[noreturn]] void outside(uintptr_t p, size_t bytes, bool write, uint32_t pc) {
  constexpr long kFar = 1 << 16;
  long nearest = kFar, offset = 0;
  size_t of = 0;
  for (const auto& [begin, buffer] : buffers) {
    const long from_begin = long(p - begin), from_end = from_begin - long(buffer.bytes);
    const long distance = from_begin < 0 ? -from_begin : std::max(from_end, 0l);
    if (distance < nearest) nearest = distance, offset = from_begin, of = buffer.bytes;
  }
  if (nearest == kFar) {
    fail("%s of %zu bytes at %p, pc:0x%x: neither shared nor global memory, nor this thread's",
         verb(write), bytes, reinterpret_cast<void*>(p), pc);
  }
  fail("out of bounds: %s of %zu bytes at byte %ld of a buffer of %zu bytes, pc:0x%x", verb(write),
       bytes, offset, of, pc);
}

Buffer* buffer_of(uintptr_t p, size_t bytes, uintptr_t& begin) {
  auto it = buffers.upper_bound(p);
  if (it == buffers.begin()) return nullptr;
  --it;
  begin = it->first;
  return p + bytes <= it->first + it->second.bytes ? &it->second : nullptr;
}

}  // namespace

void add_buffer(const void* data, size_t bytes) {
  if (bytes == 0) return;
  auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  uintptr_t known = 0;
  if (buffer_of(begin, bytes, known)) return;
  auto it = buffers.lower_bound(begin);
  if (it != buffers.begin()) {
    auto earlier = std::prev(it);
    if (earlier->first + earlier->second.bytes > begin) it = earlier;
  }
  while (it != buffers.end() && it->first < end) {
    begin = std::min(begin, it->first), end = std::max(end, it->first + it->second.bytes);
    it = buffers.erase(it);
  }
  buffers[begin] = Buffer{end - begin, {}};
}

void remove_buffer(const void* data) { buffers.erase(reinterpret_cast<uintptr_t>(data)); }

void forget_buffers() { buffers.clear(); }

std::string take_host_fault() { return std::exchange(host_fault, {}); }

namespace {

bool is_shared(const void* p) {
  return shared_near(*self()->block, reinterpret_cast<uintptr_t>(p)) != nullptr;
}

}  // namespace

void check_shared(const void* p) {
  if (!is_shared(p)) fail("an instruction for shared memory, at an address of other memory");
}

void check_global(const void* p) {
  if (is_shared(p)) fail("an instruction for global memory, at an address of shared memory");
}

void check_aligned(const void* p, size_t bytes) {
  auto address = reinterpret_cast<uintptr_t>(p);
  asm("" : "+r"(address));  // of which the compiler knows by its type that it is
  if (here != nullptr && address % bytes != 0) fail("a misaligned vector of %zu bytes", bytes);
}

void check_access(const void* p, size_t bytes, bool write) {
  checker::access(p, bytes, write, kPlain, 0);
}

namespace checker {

void forget_published();

uint32_t first_block() { return launch_begin; }

uint32_t pc_of(const void* return_address) {
  const auto address = reinterpret_cast<uintptr_t>(return_address);
  if (!library.holds(address)) library = library_of(address);
  return uint32_t(address - library.begin);
}

void begin_launch(unsigned blocks) {
  find_host_stack();
  launch_begin = next_serial;
  next_serial += blocks;
  forget_published();
}

void access(const void* address, size_t bytes, bool write, unsigned kind, uint32_t pc) {
  const auto p = reinterpret_cast<uintptr_t>(address);
  const Thread& thread = *self();
  const auto stack = reinterpret_cast<uintptr_t>(thread.stack);
  if (p >= stack && p < stack + kStackBytes) return;
  const auto place = reinterpret_cast<uintptr_t>(&thread);
  if (p >= place && p < place + sizeof(Place)) return;  // threadIdx and the like
  if (address == &here) return;
  if (library.holds(p) || host_stack.holds(p)) {  // constants; the launch's parameters
    if (write) fail("write to a variable of the host, pc:0x%x", pc);
    return;
  }
  if (SharedObject* object = shared_near(*thread.block, p)) {
    const long offset = long(p - reinterpret_cast<uintptr_t>(object->data));
    if (offset < 0 || size_t(offset) + bytes > object->bytes) {
      fail("out of bounds: %s of %zu bytes at byte %ld of a shared object of %zu bytes, pc:0x%x",
           verb(write), bytes, offset, object->bytes, pc);
    }
    return touch(object->cells, object->bytes, size_t(offset), bytes,
                 Touch(write, kind, pc, "shared", true));
  }
  uintptr_t begin = 0;
  Buffer* buffer = buffer_of(p, bytes, begin);
  if (buffer == nullptr) outside(p, bytes, write, pc);
  touch(buffer->cells, buffer->bytes, p - begin, bytes, Touch(write, kind, pc, "global", false));
}

uint64_t read_operands(const std::vector<const char*>& pieces) {
  Touch touch(false, kAsyncProxy, 0, "shared", true);
  SharedObject* object = nullptr;
  uint64_t version = 0;
  for (const char* piece : pieces) {
    if (object == nullptr || piece < object->data || piece + 16 > object->data + object->bytes) {
      object = shared_near(*self()->block, reinterpret_cast<uintptr_t>(piece));
      access(piece, 16, false, kAsyncProxy, 0);  // is it within one?
    }
    const size_t offset = size_t(piece - object->data);
    for (size_t i = offset / kCellBytes; i < (offset + 16) / kCellBytes; ++i) {
      Cell& cell = object->cells[i];
      touch(cell, i * kCellBytes);
      version = version * 31 + (uint64_t(cell.write.clock) << 16 | cell.write.thread);
    }
  }
  return version;
}

void host_access(const void* address, size_t bytes, bool write, uint32_t pc) {
  uintptr_t begin = 0;
  if (buffers.empty() || !host_fault.empty()) return;
  if (!buffer_of(reinterpret_cast<uintptr_t>(address), bytes, begin)) return;
  char text[128];
  snprintf(text, sizeof(text), "simt: host code makes a %s of device memory, pc:0x%x", verb(write),
           pc);
  host_fault = text;
}

}  // namespace checker

}  // namespace simt
