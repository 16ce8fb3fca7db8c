#pragma once

#include "common/simd.h"

namespace statescan {
inline namespace STATESCAN_ISA {

// Hands out parts of a task's scratch memory, each aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

  template <class R>
  STATESCAN_INLINE R* take(int64_t count) {
    R* part = reinterpret_cast<R*>(next_);
    next_ += (count * int64_t(sizeof(R)) + 63) / 64 * 64;
    return part;
  }

 private:
  char* next_;
};

}  // namespace STATESCAN_ISA
}  // namespace statescan
