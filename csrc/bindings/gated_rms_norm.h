// What the bindings of the gated norm for the CPU and for CUDA share: checks, and rows of any layout.
#pragma once

#include <vector>

#include "bindings/tensor.h"
#include "gated_rms_norm/shape.h"

namespace statescan::bindings::norm {

// The operands that forward and backward share.
struct Operands {
  const Tensor& x;
  const OptionalTensor &weight, &bias, &z, &residual;
};

struct Options {
  double eps;
  int64_t group_size;
  bool norm_before_gate, subtract_mean;
};

// Sizes and flags from the operands, all of them checked.
gated_rms_norm::Shape check(const Operands& o, const Options& options);
void check_like_x(const char* name, const OptionalTensor& t, const Tensor& x);

// A tensor of (..., dim), to be given strides by lay_out.
gated_rms_norm::Rows rows(const char* name, const OptionalTensor& t);

// The rows of x and of all that has its shape (data: absent or not).
struct Tensors {
  gated_rms_norm::Rows* view;
  const OptionalTensor* tensor;
};

// Fills strides and leading sizes of all that is there.
void lay_out(gated_rms_norm::Shape& p, const Tensor& x, const std::vector<Tensors>& all);

}  // namespace statescan::bindings::norm
