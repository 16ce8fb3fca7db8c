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

struct UpdateParams : UpdateShape {
  View<3> x;            // (batch, dim, tokens)
  View<3> state;        // (slot, dim, state_len)
  View<2> weight;       // (dim, width)
  View<1> bias;         // (dim), or absent
  View<3> y;            // (batch, dim, tokens)
  IndexView slot_of;    // (batch), none of the slots: skip; or absent: element b has slot b
  IndexView positions;  // (batch), where the first token goes in a circular state; or absent
};

struct VarlenStatesParams {
  int64_t dim, state_len;
  Sequences sequences;  // of one batch element
  View<3> x;            // (1, dim, total)
  View<3> states;       // (sequence, dim, state_len)
};

void fwd(const FwdParams& p, cudaStream_t stream);
// To be called before `partial` is allocated, when all else is there.
void plan(BwdParams& p);
void bwd(const BwdParams& p, cudaStream_t stream);
void update(const UpdateParams& p, cudaStream_t stream);
void varlen_states(const VarlenStatesParams& p, cudaStream_t stream);

}  // namespace statescan::causal_conv1d::cuda
