// What the bindings of the short convolution for the CPU and for CUDA share: checks.
#pragma once

#include <string>

#include "bindings/tensor.h"
#include "causal_conv1d/shape.h"

namespace statescan::bindings {

// The operands that forward and backward share.
struct Operands {
  const Tensor &x, &weight;
  const OptionalTensor &bias, &initial_state, &seq_idx, &cu_seqlens;
};

void check_weight(const Tensor& weight, const OptionalTensor& bias, int64_t dim);
// Sizes and flags from the operands, all of them checked.
causal_conv1d::Shape check(const Operands& o, bool silu, const std::string& mode);
void check_no_state(const causal_conv1d::Shape& p, const OptionalTensor& initial_state,
                    bool return_final_state);
// What both x and initial_state fit in.
ScalarType state_dtype(const Tensor& x, const OptionalTensor& initial_state);

}  // namespace statescan::bindings
