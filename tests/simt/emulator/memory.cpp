// Shared memory, and copies into it that are under way.
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "runtime.h"

namespace simt {
namespace {

constexpr size_t kPage = 4096, kAlignment = 1024;

// Arenas of blocks that have ended, by size.
std::map<size_t, std::vector<char*>> unused_arenas;

// [a page of red zone | the object's memory | a page of red zone]
char* new_arena(size_t bytes) {
  std::vector<char*>& unused = unused_arenas[bytes];
  if (!unused.empty()) {
    char* arena = unused.back();
    unused.pop_back();
    return arena;
  }
  void* memory =
      mmap(nullptr, bytes + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

}  // namespace

SharedObject::~SharedObject() { unused_arenas[arena_bytes].push_back(data - kPage); }

SharedObject* new_shared(const void* key, size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  char* data = new_arena(rounded) + kPage;
  memset(data, 0xff, rounded);  // NaN
  return new SharedObject{key, data, bytes, {}, rounded};
}

void* static_shared(const void* key, size_t bytes) {
  Block& block = *self()->block;
  for (const auto& object : block.shared) {
    if (object->key == key) return object->data;
  }
  block.shared.emplace_back(new_shared(key, bytes));
  size_t all = 0;
  for (const auto& object : block.shared) all += object->bytes;
  if (all > size_t(shared_limit))
    fail("%zu bytes of shared memory: more than a block may have", all);
  return block.shared.back()->data;
}

void* dynamic_shared() { return self()->block->shared.front()->data; }

void copy_device_memory(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

// ---- cp.async: the data arrive when they are waited for, and not before

void copy_async(void* to, const void* from, int bytes, int source_bytes, Loc loc) {
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % bytes != 0;
  };
  if (misaligned(to) || (source_bytes > 0 && misaligned(from))) {
    fail("%s: a misaligned cp.async of %d bytes", describe(loc).c_str(), bytes);
  }
  check_shared(to), check_global(from);
  if (source_bytes > 0) checker::access(from, size_t(source_bytes), false, kPlain, 0);
  checker::access(to, size_t(bytes), true, kInFlight, 0);
  memset(to, 0xff, size_t(bytes));
  self()->copies.push_back({to, from, bytes, source_bytes, self()->copy_group});
}

void commit_copies() { ++self()->copy_group; }

static void land(Thread& thread, unsigned groups) {
  std::vector<AsyncCopy>& copies = thread.copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < groups; ++done) {
    const AsyncCopy& copy = copies[done];
    checker::access(copy.to, size_t(copy.bytes), true, kLanding, 0);
    memcpy(copy.to, copy.from, size_t(copy.source_bytes));
    memset(static_cast<char*>(copy.to) + copy.source_bytes, 0,
           size_t(copy.bytes - copy.source_bytes));
  }
  copies.erase(copies.begin(), copies.begin() + long(done));
}

void wait_for_copies(int groups_left) {
  Thread& thread = *self();
  if (thread.copy_group > unsigned(groups_left)) {
    land(thread, thread.copy_group - unsigned(groups_left));
  }
}

void finish_copies(Thread& thread) { land(thread, ~0u); }

}  // namespace simt
