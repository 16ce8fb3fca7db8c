// What a CUDA source sees instead of cuda_runtime.h when it is compiled for the emulator
// (STATESCAN_SIMT): keywords, built-in variables and types, intrinsics, atomics. Every CUDA thread is
// a fiber of the one host thread; see runtime.h. There is no __shared__ on purpose: shared memory is
// block_shared<T>() or dynamic_shared<T>() of common/shared.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

// Ends the launch with a report if p is no multiple of so many bytes. Only in device code.
void check_aligned(const void* p, size_t bytes);

// A member, at the beginning, of what is moved as a whole: its address has to allow that, whatever
// accesses to single numbers the compiler makes of it.
template <size_t kBytes>
struct MovedAtOnce {
  MovedAtOnce() = default;
  MovedAtOnce(const MovedAtOnce& from) { check_aligned(&from, kBytes); }
  MovedAtOnce& operator=(const MovedAtOnce& from) {
    check_aligned(this, kBytes), check_aligned(&from, kBytes);
    return *this;
  }
};

}  // namespace simt

struct alignas(8) uint2 {
  unsigned x, y;
  [[no_unique_address]] simt::MovedAtOnce<8> whole;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
  [[no_unique_address]] simt::MovedAtOnce<16> whole;
};
struct alignas(8) float2 {
  float x, y;
  [[no_unique_address]] simt::MovedAtOnce<8> whole;
};
struct alignas(16) float4 {
  float x, y, z, w;
  [[no_unique_address]] simt::MovedAtOnce<16> whole;
};
using cudaStream_t = void*;

namespace simt {

// Where a thread is. `here` is the one that runs, null in host code.
struct Place {
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
  unsigned linear, warp, lane;
};
extern Place* here;

extern int processors;  // that the device says it has

// Where an intrinsic is called, for reports and to tell one call from another.
struct Loc {
  const char* file;
  int line;
};
#define SIMT_LOC ::simt::Loc loc = {__builtin_FILE(), __builtin_LINE()}

enum class WarpOp { kIndex, kUp, kDown, kXor, kBallot, kAny, kAll, kMatch, kSync, kCollective };
enum class Reduce { kNone, kCount, kAnd, kOr };

// All of a warp's lanes named by `mask` meet here; `in` of one becomes the result of another.
uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t in, int argument, int width, Loc loc);
// The same for anything else: f gets the lanes' arguments, null for lanes that take no part.
using WarpFunction = void (*)(void* const* arguments);
void warp_collective(WarpFunction f, const char* name, unsigned mask, void* argument, Loc loc);
// `count` threads (0: all that have not returned) arrive at barrier `id`, and wait or do not.
int block_barrier(int id, int count, bool wait, Reduce reduce, int predicate, Loc loc);

void yield(bool spinning);  // another thread's turn; `spinning`: this one only waits for a flag
void fence();
void copy_async(void* to, const void* from, int bytes, int source_bytes, Loc loc);
void commit_copies();
void wait_for_copies(int groups_left);
void check_access(const void* p, size_t bytes, bool write);
// Instructions for one kind of memory take no address of another.
void check_shared(const void* p);
void check_global(const void* p);

void* static_shared(const void* key, size_t bytes);
void* dynamic_shared();
long shared_of_block();  // bytes that a block may have: host code

// Ends the launch with a report. Only in device code.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs body(closure) as every thread of the grid. Throws std::runtime_error with a report.
void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
         void* closure);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(WarpOp op, unsigned mask, T value, int argument, int width, Loc loc) {
  return from_bits<T>(warp_exchange(op, mask, to_bits(value), argument, width, loc));
}

// *p = f(*p) as one atomic step, which the checker sees as such; the old value.
template <class T, class F>
T read_modify_write(T* p, F f) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits), "atomics have 4 or 8 bytes");
  auto* bits = reinterpret_cast<Bits*>(p);
  Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED);
  Bits after = Bits(to_bits(T(f(from_bits<T>(before)))));
  __atomic_exchange_n(bits, after,
                      __ATOMIC_RELAXED);  // nothing came between: fibers do not preempt
  yield(false);
  return from_bits<T>(before);
}

}  // namespace simt

#define threadIdx (::simt::here->thread_idx)
#define blockIdx (::simt::here->block_idx)
#define blockDim (::simt::here->block_dim)
#define gridDim (::simt::here->grid_dim)

// ---- barriers and warps

inline void __syncthreads(SIMT_LOC) {
  simt::block_barrier(0, 0, true, simt::Reduce::kNone, 0, loc);
}
inline int __syncthreads_count(int p, SIMT_LOC) {
  return simt::block_barrier(0, 0, true, simt::Reduce::kCount, p, loc);
}
inline int __syncthreads_and(int p, SIMT_LOC) {
  return simt::block_barrier(0, 0, true, simt::Reduce::kAnd, p, loc);
}
inline int __syncthreads_or(int p, SIMT_LOC) {
  return simt::block_barrier(0, 0, true, simt::Reduce::kOr, p, loc);
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_LOC) {
  simt::warp_exchange(simt::WarpOp::kSync, mask, 0, 0, 32, loc);
}
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_LOC) {
  return unsigned(simt::warp_exchange(simt::WarpOp::kBallot, mask, p != 0, 0, 32, loc));
}
inline int __any_sync(unsigned mask, int p, SIMT_LOC) {
  return int(simt::warp_exchange(simt::WarpOp::kAny, mask, p != 0, 0, 32, loc));
}
inline int __all_sync(unsigned mask, int p, SIMT_LOC) {
  return int(simt::warp_exchange(simt::WarpOp::kAll, mask, p != 0, 0, 32, loc));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_LOC) {
  return unsigned(
      simt::warp_exchange(simt::WarpOp::kMatch, mask, simt::to_bits(value), 0, 32, loc));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_LOC) {
  return simt::shuffle(simt::WarpOp::kIndex, mask, value, lane, width, loc);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, SIMT_LOC) {
  return simt::shuffle(simt::WarpOp::kUp, mask, value, int(lanes), width, loc);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, SIMT_LOC) {
  return simt::shuffle(simt::WarpOp::kDown, mask, value, int(lanes), width, loc);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_LOC) {
  return simt::shuffle(simt::WarpOp::kXor, mask, value, lanes, width, loc);
}

// ---- atomics and fences

template <class T>
T atomicAdd(T* p, T value) {
  return simt::read_modify_write(p, [&](T old) { return T(old + value); });
}
template <class T>
T atomicMax(T* p, T value) {
  return simt::read_modify_write(p, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* p, T value) {
  return simt::read_modify_write(p, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* p, T value) {
  return simt::read_modify_write(p, [&](T) { return value; });
}
template <class T>
T atomicOr(T* p, T value) {
  return simt::read_modify_write(p, [&](T old) { return T(old | value); });
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  return simt::read_modify_write(p, [&](T old) { return old == expected ? value : old; });
}
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }

// ---- scalar functions

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline float __uint_as_float(unsigned bits) { return simt::from_bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return unsigned(simt::to_bits(x)); }
template <class T>
T __ldg(const T* p) {
  simt::check_global(p);
  return *p;
}
