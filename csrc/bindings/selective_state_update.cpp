#include <torch/csrc/stable/library.h>

#include "bindings/device.h"
#include "bindings/selective_state_update.h"
#include "selective_state_update/kernels.h"

namespace statescan::bindings {
namespace {

using selective_state_update::Params;
using selective_state_update::Shape;

// Tasks that a thread takes at once. A number of the state whose decay needs an exponential of its own
// weighs as much as four that share one. Up to 256 K of the latter (20 us) a second thread costs more
// than it brings; beyond, 64 shares are even enough, and neighbours in a share reuse B and C.
int64_t grain(const Params& p) {
  const int64_t numbers = p.batch * p.tokens * p.heads * p.headdim * p.state;
  const int64_t weight = p.A.stride[2] == 0 ? 1 : 4;
  return numbers * weight <= (1 << 18) ? p.tasks() : p.tasks() / 64 + 1;
}

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
            grain(p));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("selective_state_update", TORCH_BOX(&selective_state_update));
}

}  // namespace statescan::bindings
