// The two kinds of each kernel: for any dtypes and sizes, and on tensor cores for bfloat16.
#pragma once

#include "ssd_scan/cuda.h"

namespace statescan::ssd_scan::cuda {

// Does a block have the shared memory that it takes?
bool has_tensor_walk(const WalkParams& p);
bool has_tensor_gradients(const GradientParams& p);

Room plain_walk_room(const WalkParams& p);
Room plain_gradient_room(const GradientParams& p);
// Is it one for Hopper, and worth it?
bool has_hopper_walk(const WalkParams& p);
void hopper_walk(const WalkParams& p, cudaStream_t stream);
void plain_walk(const WalkParams& p, cudaStream_t stream);
void tensor_walk(const WalkParams& p, cudaStream_t stream);
void tensor_gradients(const GradientParams& p, cudaStream_t stream);
void plain_gradients(const GradientParams& p, cudaStream_t stream);

}  // namespace statescan::ssd_scan::cuda
