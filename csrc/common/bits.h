// Moving elements without regard to what they are: as integers of their size, in lanes that can be
// transposed. 16-bit elements travel in pairs, or alone in lanes twice as wide.
#pragma once

#include "common/simd.h"
#include "common/view.h"

namespace statescan {
inline namespace STATESCAN_ISA {

template <class E>
using Lane = std::conditional_t<sizeof(E) == 8, uint64_t, uint32_t>;

// Calls f with a null pointer to an integer of the element's size.
template <class F>
STATESCAN_INLINE void with_bits(DType dtype, F&& f) {
  switch (element_bytes(dtype)) {
    case 2: return f((uint16_t*)nullptr);
    case 4: return f((uint32_t*)nullptr);
    default: return f((uint64_t*)nullptr);
  }
}

// kLanes<Lane<E>> elements, each in a lane.
template <class E>
STATESCAN_INLINE Vec<Lane<E>> load_bits(const E* p) {
  if constexpr (sizeof(E) == 2) {
    using Narrow = typename VectorOf<uint16_t, kLanes<uint32_t>>::type;
    return __builtin_convertvector(load_as<Narrow>(p), Vec<uint32_t>);
  } else {
    return load(p);
  }
}

// The low 16 bits of each lane, if elements have 16.
template <class E>
STATESCAN_INLINE void store_bits(E* p, Vec<Lane<E>> v) {
  if constexpr (sizeof(E) == 2) {
    using Narrow = typename VectorOf<uint16_t, kLanes<uint32_t>>::type;
    const Narrow narrow = __builtin_convertvector(v, Narrow);
    memcpy(p, &narrow, sizeof(narrow));
  } else {
    store(p, v);
  }
}

}  // namespace STATESCAN_ISA
}  // namespace statescan
