#include <torch/csrc/stable/library.h>

#include "bindings/runs.h"
#include "bindings/selective_state_update.h"
#include "bindings/stream.h"
#include "selective_state_update/cuda.h"

namespace statescan::bindings {
namespace {

using selective_state_update::Shape;
using selective_state_update::cuda::Params;

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
  if (state_batch_indices) {
    p.slot_of = index_view("state_batch_indices", *state_batch_indices, state);
  }
  const OnDevice device(state);
  const Tensor y = output(in, out_dtype, p);
  update(p, device.stream);
  return y;
}

}  // namespace

STATESCAN_CUDA_IMPL(m) { m.impl("selective_state_update", TORCH_BOX(&selective_state_update)); }

}  // namespace statescan::bindings
