// The emulator's side of csrc/common/ptx90.cuh, which says what each function does.
#pragma once

#include "simt.h"

namespace statescan::ptx {

inline constexpr bool kHopper = true;

void have_registers(int count);
template <int kCount>
void have_more_registers() {
  have_registers(kCount);
}
template <int kCount>
void have_less_registers() {
  have_registers(kCount);
}

// ---- wgmma (wgmma.cpp)

void fence_proxy_async();
void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], SIMT_LOC);

uint64_t wgmma_operand(const void* p, int pieces = 0);
void hand_over(const void* registers, size_t bytes);
void begin_products(SIMT_LOC);
void wgmma_commit(SIMT_LOC);
void await_products(int groups_left, simt::Loc loc);
void hand_back(const void* registers, size_t bytes, simt::Loc loc);
void product(float* d, bool a_is_shared, uint64_t a, const uint32_t* a_registers, uint64_t b,
             bool depth_first, bool add, simt::Loc loc);

template <class Registers>
void keep(Registers&) {}
template <class... Registers>
void wgmma_fence(Registers&... x) {
  (hand_over(&x, sizeof(x)), ...);
  begin_products();
}
// No default argument can follow a pack: reports have this place.
template <int kGroups, class... Registers>
void wgmma_wait(Registers&... x) {
  const simt::Loc loc = {__builtin_FILE(), __builtin_LINE()};
  await_products(kGroups, loc);
  (hand_back(&x, sizeof(x), loc), ...);
}

template <bool kDepthFirst>
void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b, bool add, SIMT_LOC) {
  product(d, true, a, nullptr, b, kDepthFirst, add, loc);
}
inline void wgmma_64x64x16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, SIMT_LOC) {
  product(d, false, 0, a, b, true, true, loc);
}

}  // namespace statescan::ptx
