#include <torch/csrc/stable/library.h>

#include "bindings/device.h"
#include "bindings/selective_state_update.h"
#include "selective_state_update/kernels.h"

namespace statescan::bindings {
namespace {

using selective_state_update::Params;
using selective_state_update::Shape;

Tensor selective_state_update(const Tensor& state, const Tensor& x, const Tensor& dt,
                              const Tensor& A, const Tensor& B, const Tensor& C,
                              const OptionalTensor& D, const OptionalTensor& z,
                              const OptionalTensor& dt_bias,
                              const OptionalTensor& state_batch_indices, bool dt_softplus,
                              double dt_min, double dt_max, bool compute_output,
                              std::optional<ScalarType> out_dtype) {
  const UpdateArguments in{state,       x,
                           dt,          A,
                           B,           C,
                           D,           z,
                           dt_bias,     state_batch_indices,
                           dt_softplus, dt_min,
                           dt_max,      compute_output};
  Params p{};
  static_cast<Shape&>(p) = check(in);
  check_cpu("state", state);
  std::vector<int64_t> slots;
  if (state_batch_indices) {
    slots = slot_indices("state_batch_indices", *state_batch_indices, p.batch, p.slots);
    p.slot_of = slots.data();
  }
  const Tensor y = output(in, out_dtype, p);
  run_tasks([](const Params& q, const Range& r) { update(q, r); }, p, p.tasks(), p.scratch_bytes(),
            p.grain());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("selective_state_update", TORCH_BOX(&selective_state_update));
}

}  // namespace statescan::bindings
