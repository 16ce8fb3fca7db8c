// Parameters and entry point of the state update's CPU kernel.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "selective_state_update/shape.h"

namespace statescan::selective_state_update {

// A task is one batch element and some rows of one head, all its tokens in order. No row looks at
// another, so neither the cut into tasks nor the number of threads shows in the result.
struct Params : Shape {
  const int64_t* slot_of;  // (batch), negative: skip this element; null: element b has slot b

  // About 4096 numbers of the state: 16 KB, half of a first-level cache, and enough work for what a
  // task costs to set up. Whole vectors of rows.
  int64_t task_rows() const {
    const int64_t rows = state > 256 ? 16 : 4096 / state / 16 * 16;
    return rows < headdim ? rows : headdim;
  }
  int64_t tasks_per_head() const { return (headdim + task_rows() - 1) / task_rows(); }
  int64_t tasks() const {
    return headdim == 0 || tokens == 0 ? 0 : batch * heads * tasks_per_head();
  }

  // Tasks that a thread takes at once. A number of the state whose decay needs an exponential of its
  // own weighs as much as four that share one. Up to 256 K of the latter (20 us) a second thread costs
  // more than it brings; beyond, 64 shares are even enough, and neighbours in a share reuse B and C.
  int64_t grain() const {
    const int64_t weight = A.stride[2] == 0 ? 1 : 4;
    const bool few = batch * tokens * heads * headdim * state * weight <= (1 << 18);
    return few ? tasks() : tasks() / 64 + 1;
  }

  static constexpr int64_t kWidest = 16;  // lanes of the widest vector
  int64_t pitch() const { return (state + kWidest - 1) / kWidest * kWidest; }
  int64_t scratch_bytes() const {
    const int64_t rows = task_rows() + kWidest;
    const int64_t scalars = 5 * rows + 2 * pitch() + 2 * task_rows() * pitch();
    return scalars * element_bytes(compute) + 16 * 64;
  }
};

STATESCAN_CPU_KERNEL(update, Params)

}  // namespace statescan::selective_state_update
