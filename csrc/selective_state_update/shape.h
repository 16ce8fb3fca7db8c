// The state update's problem, for the CPU and the GPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/view.h"

namespace statescan::selective_state_update {

// One form for both models: a head is headdim rows of the state, `state` numbers each. Mamba-2
// says so itself; in Mamba-1 the channels that share a group's B and C are a head, and a channel is
// a row.
struct Shape {
  int64_t batch, tokens, heads, headdim, state, groups, slots;
  bool dt_softplus;
  double dt_min, dt_max;
  bool compute_output;
  DType compute;  // kFloat32 or kFloat64

  View<4> h;        // (slot, head, headdim, state), read and written
  View<4> x, dt;    // (batch, token, head, headdim)
  View<3> A;        // (head, headdim, state)
  View<4> B, C;     // (batch, token, group, state)
  View<2> D;        // (head, headdim), or absent
  View<4> z;        // (batch, token, head, headdim), or absent
  View<2> dt_bias;  // (head, headdim), or absent
  View<4> y;        // (batch, token, head, headdim), absent without compute_output

  // One step size, and with it one decay, serves a whole head.
  STATESCAN_HOST_DEVICE bool step_is_tied() const {
    return dt.stride[3] == 0 && (!dt_bias || dt_bias.stride[1] == 0);
  }
  STATESCAN_HOST_DEVICE bool decay_is_tied() const {
    return step_is_tied() && A.stride[1] == 0 && A.stride[2] == 0;
  }
};

}  // namespace statescan::selective_state_update
