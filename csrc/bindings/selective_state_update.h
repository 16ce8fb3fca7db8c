// What the bindings of the state update for the CPU and for CUDA share: checks and views.
#pragma once

#include <string>

#include "bindings/tensor.h"
#include "selective_state_update/shape.h"

namespace statescan::bindings {

struct UpdateArguments {
  const Tensor &state, &x, &dt, &A, &B, &C;
  const OptionalTensor &D, &z, &dt_bias, &slots;
  bool dt_softplus;
  double dt_min, dt_max;
  bool compute_output;
};

// Sizes, flags and views of all that is read; all is checked but what the indices hold.
selective_state_update::Shape check(const UpdateArguments& x);

// y, and its view in the shape.
Tensor output(const UpdateArguments& x, std::optional<ScalarType> out_dtype,
              selective_state_update::Shape& p);

}  // namespace statescan::bindings
