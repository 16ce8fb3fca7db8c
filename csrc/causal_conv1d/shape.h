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

// A decode step: one or a few tokens, with the inputs before them in a state that is changed in place.
struct UpdateShape {
  int64_t batch, dim, tokens, width, state_len, slots;
  bool silu;
  DType compute;
};

}  // namespace statescan::causal_conv1d
