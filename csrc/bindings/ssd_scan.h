// What the bindings of the SSD scan for the CPU and for CUDA share: checks and views.
#pragma once

#include "bindings/tensor.h"
#include "ssd_scan/shape.h"

namespace statescan::bindings {

// The operands and flags that forward and backward share.
struct SsdOperands {
  const Tensor& x;
  const OptionalTensor &dt, &A;
  const Tensor &B, &C;
  const OptionalTensor &D, &z, &dt_bias, &log_decay, &initial_states, &seq_idx, &cu_seqlens;
  bool dt_softplus;
  double dt_min, dt_max;
  bool reverse, shift_output;
  int64_t chunk;
};

// Sizes and flags from the operands, all of them checked. `bfloat16` is left to the caller.
ssd_scan::Shape check_ssd(const SsdOperands& x);
// Are the operands of products all bfloat16?
bool is_bfloat16(const SsdOperands& x, const ssd_scan::Shape& p);

// (batch, sequence, head, headdim, state) or (slot, head, headdim, state)
Sizes ssd_state_sizes(const ssd_scan::Shape& p, int64_t slots, bool slots_by_id);
void check_initial_states(const SsdOperands& x, const ssd_scan::Shape& p, int64_t slots,
                          bool slots_by_id);
// fail unless the gradients and saved states of a backward are of the right shape and dtype.
void check_ssd_gradients(const SsdOperands& x, const ssd_scan::Shape& p, const OptionalTensor& dy,
                         const OptionalTensor& dfinal_states, const OptionalTensor& dchunk_states,
                         const Tensor& cell_states, const Sizes& state_sizes);

// (slot, head, headdim, state) of a contiguous tensor of states that may have an axis of sequences.
View<4> ssd_slot_view(const char* name, const Tensor& t);

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

// The inputs that all kernels' parameters have.
template <class Params>
void fill(Params& params, const SsdOperands& x) {
  params.x = view<4>("x", x.x);
  params.z = view<4>("z", x.z);
  params.dt = x.log_decay ? view<3>("log_decay", x.log_decay) : view<3>("dt", x.dt);
  params.A = view<1>("A", x.A);
  params.dt_bias = view<1>("dt_bias", x.dt_bias);
  params.B = view<4>("B", x.B);
  params.C = view<4>("C", x.C);
  if (!x.D) return;
  params.D.data = x.D->data_ptr();
  params.D.dtype = float_dtype("D", *x.D);
  params.D.stride[0] = x.D->stride(0);
  params.D.stride[1] = x.D->dim() == 2 ? x.D->stride(1) : 0;
}

}  // namespace statescan::bindings
