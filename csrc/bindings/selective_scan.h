// What the bindings of the selective scan for the CPU and for CUDA share: checks.
#pragma once

#include "bindings/tensor.h"
#include "selective_scan/shape.h"

namespace statescan::bindings {

// The operands that forward and backward share.
struct ScanOperands {
  const Tensor &u, &delta, &A, &B, &C;
  const OptionalTensor &D, &z, &delta_bias, &initial_state, &seq_idx, &cu_seqlens;
};

// Sizes and flags from the operands, all of them checked.
selective_scan::Shape check_scan(const ScanOperands& x, bool delta_softplus, bool reverse,
                                 int64_t chunk);
// B, C or their gradient as (batch, group, state, seqlen); constant: strides (0, dim, state, 0).
View<4> projection_view(const char* name, const Tensor& x);

}  // namespace statescan::bindings
