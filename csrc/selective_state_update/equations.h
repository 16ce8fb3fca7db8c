// One step of the recurrence, for a model that generates. Mamba (Gu & Dao 2023), eq. 2, and Mamba-2
// (Dao & Gu 2024), section 3, where A is one number for each head:
//
//   dt' = clamp(softplus(dt + dt_bias), dt_min, dt_max)
//   h  <- exp(dt' A) h + dt' x B            decay and next_state of selective_scan/equations.h
//   y   = (<C, h> + D x) silu(z)
//
// Include the device's mathematics (common/vector_math.h on the CPU) before this file.
#pragma once

#include "common/host_device.h"
#include "selective_scan/equations.h"

namespace statescan::selective_state_update {

using selective_scan::decay;
using selective_scan::next_state;

// dt'. A dt that is not a number stays one.
template <class V, class R>
STATESCAN_HOST_DEVICE V step_size(V dt, V dt_bias, bool apply_softplus, R dt_min, R dt_max) {
  V step = dt + dt_bias;
  if (apply_softplus) step = softplus(step);
  step = step < dt_min ? V{} + dt_min : step;
  return step > dt_max ? V{} + dt_max : step;
}

template <class V>
STATESCAN_HOST_DEVICE V skip(V y, V D, V x) {
  return y + D * x;
}

template <class V>
STATESCAN_HOST_DEVICE V gate(V y, V z) {
  return y * silu(z);
}

}  // namespace statescan::selective_state_update
