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

// The operands of a decode step.
struct UpdateOperands {
  const Tensor &x, &conv_state, &weight;
  const OptionalTensor &bias, &cache_seqlens, &conv_state_indices;
};

// Sizes and flags; all is checked but what the integers hold.
causal_conv1d::UpdateShape check(const UpdateOperands& o, bool silu);
// x (batch, dim) as (batch, dim, 1).
View<3> token_view(const char* name, const Tensor& t);

// x, cu_seqlens and state_len of causal_conv1d_varlen_states.
void check_varlen_states(const Tensor& x, int64_t state_len);

}  // namespace statescan::bindings
