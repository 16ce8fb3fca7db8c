// The kinds of each kernel: for any dtypes and sizes, on tensor cores, and of the walk for Hopper.
#pragma once

#include "ssd_scan/cuda.h"

namespace statescan::ssd_scan::cuda {

// Does a block have the shared memory that it takes?
bool has_tensor_walk(const WalkParams& p);
bool has_tensor_gradients(const GradientParams& p);
// Is the walk for Hopper there, and worth it? Where it is, so is the one on tensor cores.
bool has_hopper_walk(const WalkParams& p);

Room plain_walk_room(const WalkParams& p);
Room plain_gradient_room(const GradientParams& p);
void plain_walk(const WalkParams& p, cudaStream_t stream);
void tensor_walk(const WalkParams& p, cudaStream_t stream);
void hopper_walk(const WalkParams& p, cudaStream_t stream);
void tensor_gradients(const GradientParams& p, cudaStream_t stream);
void plain_gradients(const GradientParams& p, cudaStream_t stream);

}  // namespace statescan::ssd_scan::cuda
