// The selective scan's problem, for the CPU and the GPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/view.h"

namespace statescan::selective_scan {

// What is to be computed, wherever it is computed.
struct Shape {
  int64_t batch, dim, seqlen, state, groups;
  int64_t delta_repeat;  // neighbouring channels that share a row of delta
  int64_t chunk;         // steps between two saved states
  bool delta_softplus, reverse;
  bool constant_B, constant_C;  // (dim, state), the same at all times
  DType compute;                // kFloat32 or kFloat64

  STATESCAN_HOST_DEVICE int64_t chunks() const { return (seqlen + chunk - 1) / chunk; }
  STATESCAN_HOST_DEVICE int64_t group_dim() const { return dim / groups; }
};

}  // namespace statescan::selective_scan
