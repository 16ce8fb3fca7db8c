// The emulator's side of csrc/common/ptx.cuh, which says what each function does.
#pragma once

#include "common/half.h"
#include "simt.h"

namespace statescan::ptx {

inline int opaque(int x) { return x; }
template <class T>
T* opaque(T* p) {
  return p;
}
inline int lane() { return int(simt::here->lane); }

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float ex2(float x) { return flush(std::exp2(flush(x))); }
inline float rcp(float x) { return flush(1.0f / flush(x)); }

inline float at_least(float x, float low) { return x < low ? low : x; }
inline float at_most(float x, float high) { return x > high ? high : x; }

inline uint32_t pack_bf16(float low, float high) {
  return from_float<BFloat16>(low).bits | uint32_t(from_float<BFloat16>(high).bits) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return from_float<Half>(low).bits | uint32_t(from_float<Half>(high).bits) << 16;
}
inline float f16_to_float(uint16_t bits) { return to_float(Half{bits}); }

inline uint32_t pair_halves(int half, uint32_t first, uint32_t second) {
  return half ? first >> 16 | (second & 0xffff0000) : (first & 0xffff) | second << 16;
}

template <class T>
T& in_global(T* p) {
  simt::check_global(p);
  return *p;
}
inline uint4 load_streaming(const uint4* p) { return in_global(p); }
inline void store_streaming(uint4* p, uint4 v) { in_global(p) = v; }
inline void store(uint2* p, uint2 v) { in_global(p) = v; }
inline void store(uint4* p, uint4 v) { in_global(p) = v; }

// There is no cache: but what is asked for must be there.
inline void prefetch(const void* p) {
  simt::check_global(p);
  (void)*static_cast<const volatile char*>(p);
}

inline void cp_async_16(void* shared, const void* global, int source_bytes = 16, SIMT_LOC) {
  simt::copy_async(shared, global, 16, source_bytes, loc);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kGroups>
void cp_async_wait() {
  simt::wait_for_copies(kGroups);
}

inline uint32_t ld_acquire(const uint32_t* p) {
  simt::yield(true);
  return __atomic_load_n(&in_global(p), __ATOMIC_ACQUIRE);
}
inline uint32_t ld_relaxed(const uint32_t* p) {
  simt::yield(true);
  return __atomic_load_n(&in_global(p), __ATOMIC_RELAXED);
}
inline void st_release(uint32_t* p, uint32_t v) {
  __atomic_store_n(&in_global(p), v, __ATOMIC_RELEASE);
  simt::yield(false);
}
inline void st_relaxed(uint32_t* p, uint32_t v) {
  __atomic_store_n(&in_global(p), v, __ATOMIC_RELAXED);
  simt::yield(false);
}

inline void barrier_sync(int id, int threads, SIMT_LOC) {
  simt::block_barrier(id, threads, true, simt::Reduce::kNone, 0, loc);
}
inline void barrier_arrive(int id, int threads, SIMT_LOC) {
  simt::block_barrier(id, threads, false, simt::Reduce::kNone, 0, loc);
}

// ---- mbarriers (mbarrier.cpp)

void mbarrier_init(uint64_t* barrier, int count, SIMT_LOC);
void mbarrier_arrive(uint64_t* barrier, SIMT_LOC);
void mbarrier_wait(uint64_t* barrier, unsigned parity, SIMT_LOC);

// ---- tensor cores (tensor_cores.cpp)

void mma_16x8x16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_LOC);
void mma_16x8x16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const float (&c)[4], SIMT_LOC);
void mma_16x8x16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_LOC);
void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_LOC);
uint32_t to_tf32(float x);
void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_LOC);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_LOC);

}  // namespace statescan::ptx
