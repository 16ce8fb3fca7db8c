// Parameters and launcher of the state update's CUDA kernels.
#pragma once

#include "common/cuda.h"
#include "common/runs.cuh"
#include "selective_state_update/shape.h"

namespace statescan::selective_state_update::cuda {

struct Params : Shape {
  IndexView slot_of;  // (batch), none of the slots: skip this element; absent: element b has slot b
};

void update(const Params& p, cudaStream_t stream);

}  // namespace statescan::selective_state_update::cuda
