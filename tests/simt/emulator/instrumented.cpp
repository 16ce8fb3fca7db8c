// What -fsanitize=thread makes of every access in the sources it compiles: calls of these functions.
// They take the place of ThreadSanitizer's own library, which is not linked.
#include "checker.h"
#include "runtime.h"

using simt::here;
namespace checker = simt::checker;

#define PC checker::pc_of(__builtin_return_address(0))

static inline void plain(const void* p, size_t bytes, bool write, uint32_t pc) {
  if (here == nullptr) return checker::host_access(p, bytes, write, pc);
  checker::access(p, bytes, write, simt::kPlain, pc);
}

static inline void aligned(const void* p, size_t bytes, bool write, uint32_t pc) {
  if (here != nullptr && reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    simt::fail("misaligned %s of %zu bytes at %p, pc:0x%x", write ? "write" : "read", bytes, p, pc);
  }
  plain(p, bytes, write, pc);
}

static inline void atomic(const volatile void* p, size_t bytes, bool write, int order,
                          uint32_t pc) {
  if (here == nullptr) return;
  const bool acquires = order == __ATOMIC_ACQUIRE || order == __ATOMIC_CONSUME ||
                        order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
  const bool releases =
      order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
  checker::atomic(const_cast<const void*>(p), bytes, write, acquires, releases, pc);
}

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define ACCESSES(n)                                                   \
  void __tsan_read##n(void* p) { aligned(p, n, false, PC); }          \
  void __tsan_write##n(void* p) { aligned(p, n, true, PC); }          \
  void __tsan_unaligned_read##n(void* p) { plain(p, n, false, PC); }  \
  void __tsan_unaligned_write##n(void* p) { plain(p, n, true, PC); }  \
  void __tsan_volatile_read##n(void* p) { aligned(p, n, false, PC); } \
  void __tsan_volatile_write##n(void* p) { aligned(p, n, true, PC); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(void* p, unsigned long bytes) {
  if (bytes > 0) plain(p, bytes, false, PC);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  if (bytes > 0) plain(p, bytes, true, PC);
}

#define ATOMICS(bits, T)                                                                          \
  T __tsan_atomic##bits##_load(const volatile T* p, int order) {                                  \
    atomic(p, sizeof(T), false, order, PC);                                                       \
    return *p;                                                                                    \
  }                                                                                               \
  void __tsan_atomic##bits##_store(volatile T* p, T value, int order) {                           \
    atomic(p, sizeof(T), true, order, PC);                                                        \
    *p = value;                                                                                   \
  }                                                                                               \
  T __tsan_atomic##bits##_exchange(volatile T* p, T value, int order) {                           \
    atomic(p, sizeof(T), true, order, PC);                                                        \
    const T before = *p;                                                                          \
    *p = value;                                                                                   \
    return before;                                                                                \
  }                                                                                               \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T value, int order) {                          \
    atomic(p, sizeof(T), true, order, PC);                                                        \
    const T before = *p;                                                                          \
    *p = before + value;                                                                          \
    return before;                                                                                \
  }                                                                                               \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T value, int order) {                          \
    return __tsan_atomic##bits##_fetch_add(p, T(0) - value, order);                               \
  }                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T value,          \
                                                    int order, int) {                             \
    atomic(p, sizeof(T), true, order, PC);                                                        \
    const bool same = *p == *expected;                                                            \
    if (same) {                                                                                   \
      *p = value;                                                                                 \
    } else {                                                                                      \
      *expected = *p;                                                                             \
    }                                                                                             \
    return same;                                                                                  \
  }                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T value, int order, \
                                                  int otherwise) {                                \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, value, order, otherwise);   \
  }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

void __tsan_atomic_thread_fence(int) { simt::fence(); }
void __tsan_atomic_signal_fence(int) {}
}
