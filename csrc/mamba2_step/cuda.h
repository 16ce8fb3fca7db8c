// Parameters and launcher of the Mamba-2 step's CUDA kernels.
#pragma once

#include "causal_conv1d/cuda.h"
#include "selective_state_update/cuda.h"

namespace statescan::mamba2_step::cuda {

// Both updates, of the same slots. conv.y, and with it step.x, step.B and step.C, have memory only
// where there are two launches.
struct Params {
  causal_conv1d::cuda::UpdateParams conv;
  selective_state_update::cuda::Params step;
};

bool in_one_launch(const Params& p);
void step(const Params& p, cudaStream_t stream);

}  // namespace statescan::mamba2_step::cuda
