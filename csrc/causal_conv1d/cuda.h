// Parameters and launchers of the short convolution's CUDA kernels.
#pragma once

#include <cstdint>

#include "causal_conv1d/shape.h"
#include "common/cuda.h"
#include "common/runs.cuh"
#include "common/view.h"

namespace statescan::causal_conv1d::cuda {

struct FwdParams : Shape {
  View<3> x;              // (batch, dim, seqlen)
  View<2> weight;         // (dim, width)
  View<1> bias;           // (dim), or absent
  View<3> initial_state;  // (slot, dim, width - 1), or absent: zero
  View<3> y;              // (batch, dim, seqlen)
  View<3> final_state;    // (slot, dim, width - 1), or absent
  Sequences sequences;    // with ends where there is a state and seq_idx
};

void fwd(const FwdParams& p, cudaStream_t stream);

}  // namespace statescan::causal_conv1d::cuda
