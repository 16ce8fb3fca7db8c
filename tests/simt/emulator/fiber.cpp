#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#error "the emulator's fibers are written for x86-64: port simt_switch"
#endif

asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {

char* new_stack(size_t bytes) {
  constexpr size_t kPage = 4096;
  void* memory = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kPage, PROT_NONE);
  return static_cast<char*>(memory) + kPage;
}

void* start_of(char* stack, size_t bytes, unsigned stagger, void (*entry)()) {
  // Tops at different offsets: equal ones would compete for the same lines of the cache.
  auto top = reinterpret_cast<uintptr_t>(stack) + bytes - 64 - stagger % 16 * 320;
  auto** at = reinterpret_cast<void**>(top / 16 * 16);
  *--at = nullptr;  // where `entry` would return to
  *--at = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--at = nullptr;
  return at;
}

}  // namespace simt
