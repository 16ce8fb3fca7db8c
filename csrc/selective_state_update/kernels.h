// Parameters and entry point of the state update's CPU kernel.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace statescan::selective_state_update {

// One form for both models: a head is headdim rows of the state, `state` numbers each. Mamba-2
// says so itself; in Mamba-1 the channels that share a group's B and C are a head, and a channel is
// a row.
//
// A task is one batch element and some rows of one head, all its tokens in order. No row looks at
// another, so neither the cut into tasks nor the number of threads shows in the result.
struct Params {
  int64_t batch, tokens, heads, headdim, state, groups;
  bool dt_softplus;
  double dt_min, dt_max;
  bool compute_output;
  DType compute;         // kFloat32 or kFloat64
  const int64_t* slots;  // (batch), negative: skip this element; null: element b has slot b

  View<4> h;        // (slot, head, headdim, state), read and written
  View<4> x, dt;    // (batch, token, head, headdim)
  View<3> A;        // (head, headdim, state)
  View<4> B, C;     // (batch, token, group, state)
  View<2> D;        // (head, headdim), or absent
  View<4> z;        // (batch, token, head, headdim), or absent
  View<2> dt_bias;  // (head, headdim), or absent
  View<4> y;        // (batch, token, head, headdim), absent without compute_output

  // One step size, and with it one decay, serves a whole head.
  bool step_is_tied() const { return dt.stride[3] == 0 && (!dt_bias || dt_bias.stride[1] == 0); }
  bool decay_is_tied() const { return step_is_tied() && A.stride[1] == 0 && A.stride[2] == 0; }

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
