// What the bindings of the Mamba-2 step for the CPU and for CUDA share: checks and views.
#pragma once

#include "bindings/tensor.h"
#include "causal_conv1d/shape.h"
#include "gated_rms_norm/shape.h"
#include "selective_state_update/shape.h"

namespace statescan::bindings {

struct StepArguments {
  const Tensor &zxbcdt, &conv_state, &ssm_state, &conv_weight, &A;
  const OptionalTensor &conv_bias, &dt_bias, &D, &norm_weight, &cache_seqlens, &state_batch_indices;
  double norm_eps;
  bool norm_before_gate;
  std::optional<int64_t> norm_group_size;
  bool silu, dt_softplus;
  double dt_min, dt_max;
};

// Both updates, and the norm if there is one. What the convolution gives, x, B and C side by side,
// is still without memory, and so is what the norm reads and writes.
struct StepViews {
  causal_conv1d::UpdateShape conv;
  View<3> xBC, conv_state;  // (batch, dim, tokens), (slot, dim, state_len)
  View<2> weight;           // (dim, width)
  View<1> bias;             // (dim), or absent
  selective_state_update::Shape step;
  gated_rms_norm::Shape norm;  // x and z are (batch, token, inner)

  Sizes convolved_sizes() const { return {conv.batch, conv.tokens, conv.dim}; }
};

// All is checked but what the integers hold.
StepViews check(const StepArguments& in);

// (batch, [tokens,] inner)
Tensor new_rows(const StepArguments& in, const StepViews& p);
View<4> view_of_heads(const Tensor& rows, const StepViews& p);

// Gives x, B and C the memory where the convolution puts them, and a view of all of it. null: only
// their shape.
View<3> place_convolved(void* data, StepViews& p);

// The parameters of the convolution's kernels, on the CPU or on CUDA, but for its integers.
template <class Conv>
void fill(const StepViews& from, const View<3>& y, Conv& p) {
  static_cast<causal_conv1d::UpdateShape&>(p) = from.conv;
  p.x = from.xBC, p.y = y, p.state = from.conv_state, p.weight = from.weight, p.bias = from.bias;
}

// The parameters of the norm's kernels, from what the state update gave to `out`.
template <class Norm>
void fill(const StepViews& from, const Tensor& y, const Tensor& out, Norm& p) {
  static_cast<gated_rms_norm::Shape&>(p) = from.norm;
  p.x.data = y.data_ptr();
  p.y = p.x, p.y.data = out.data_ptr();
}

}  // namespace statescan::bindings
