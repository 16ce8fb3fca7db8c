// The short convolution's problem, for the CPU and the GPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/view.h"

namespace statescan::causal_conv1d {

enum class Mode : int8_t { kCausal, kAnticausal, kSame };

// What is to be computed, wherever it is computed.
struct Shape {
  int64_t batch, dim, seqlen, width;
  Mode mode;
  bool silu;
  DType compute;  // kFloat32 or kFloat64

  // Padding of a sequence, see equations.h.
  STATESCAN_HOST_DEVICE int64_t left() const {
    return mode == Mode::kCausal ? width - 1 : mode == Mode::kSame ? (width - 1) / 2 : 0;
  }
  STATESCAN_HOST_DEVICE int64_t right() const { return width - 1 - left(); }
};

}  // namespace statescan::causal_conv1d
