// Parameters and launchers of the short convolution's CUDA kernels.
#pragma once

#include <cstdint>

#include "causal_conv1d/shape.h"
#include "common/cuda.h"
#include "common/runs.cuh"
#include "common/view.h"

namespace statescan::causal_conv1d::cuda {

// What forward and backward read.
struct Inputs : Shape {
  View<3> x;              // (batch, dim, seqlen)
  View<2> weight;         // (dim, width)
  View<1> bias;           // (dim), or absent
  View<3> initial_state;  // (slot, dim, width - 1), or absent: zero
  Sequences sequences;    // with ends where there is a state and seq_idx
};

struct FwdParams : Inputs {
  View<3> y;            // (batch, dim, seqlen)
  View<3> final_state;  // (slot, dim, width - 1), or absent
};

struct BwdParams : Inputs {
  View<3> dy;            // (batch, dim, seqlen), or absent: zero
  View<3> dfinal_state;  // (slot, dim, width - 1), or absent: zero

  View<3> dx;              // (batch, dim, seqlen)
  View<2> dweight;         // (dim, width)
  View<1> dbias;           // (dim), or absent
  View<3> dinitial_state;  // (slot, dim, width - 1), or absent
  void* partial;           // (parts, width + 1, dim): sums of a piece each, in the compute type

  static constexpr int64_t kSteps = 128;  // of a piece
  int64_t pieces() const { return (seqlen + kSteps - 1) / kSteps; }
  int64_t parts() const { return batch * pieces(); }
};

void fwd(const FwdParams& p, cudaStream_t stream);
void bwd(const BwdParams& p, cudaStream_t stream);

}  // namespace statescan::causal_conv1d::cuda
