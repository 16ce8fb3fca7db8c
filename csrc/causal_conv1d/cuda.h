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
  void* partial;           // (rows, width + 1, dim): sums of a piece each, in the compute type

  // Set by plan.
  int64_t steps, pieces;  // of each batch element, `steps` time steps each
  int64_t edge_rows;      // rows of `partial` for what states reach
  STATESCAN_HOST_DEVICE int64_t parts() const { return batch * pieces; }
  int64_t rows() const { return parts() + edge_rows; }
};

void fwd(const FwdParams& p, cudaStream_t stream);
// To be called before `partial` is allocated, when all else is there.
void plan(BwdParams& p);
void bwd(const BwdParams& p, cudaStream_t stream);

}  // namespace statescan::causal_conv1d::cuda
