// What the bindings of the gated norm for the CPU and for CUDA share: checks, and rows of any layout.
#pragma once

#include <optional>
#include <tuple>
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

// What the forward returns: y, and x + residual if it is asked for.
struct Results {
  OptionalTensor x, y, residual_out;

  Results(const Operands& o, std::optional<ScalarType> out_dtype,
          std::optional<ScalarType> residual_dtype, bool return_residual);

  // Makes them and the operands p's; all that has to be laid out.
  template <class FwdParams>
  std::vector<Tensors> join(FwdParams& p, const Operands& o) const {
    p.weight = view<1>("weight", o.weight), p.bias = view<1>("bias", o.bias);
    p.x = rows("x", x), p.z = rows("z", o.z), p.residual = rows("residual", o.residual);
    p.y = rows("out_dtype", y), p.residual_out = rows("residual_dtype", residual_out);
    return {{&p.x, &x},
            {&p.z, &o.z},
            {&p.residual, &o.residual},
            {&p.y, &y},
            {&p.residual_out, &residual_out}};
  }
  // As the operator returns them: empty where there is none.
  std::tuple<Tensor, Tensor> all() const;
};

// What the backward gets and returns. dz as z; dresidual is dx where it is not there.
struct Gradients {
  const OptionalTensor &dy, &dresidual_out;
  OptionalTensor x, dx, dz, dresidual, dweight, dbias;

  Gradients(const Operands& o, const OptionalTensor& dy, const OptionalTensor& dresidual_out,
            ScalarType dx_dtype, std::optional<ScalarType> dresidual_dtype);

  template <class BwdParams>
  std::vector<Tensors> join(BwdParams& p, const Operands& o) const {
    p.weight = view<1>("weight", o.weight), p.bias = view<1>("bias", o.bias);
    p.x = rows("x", x), p.z = rows("z", o.z), p.residual = rows("residual", o.residual);
    p.dy = rows("dy", dy), p.dresidual_out = rows("dresidual_out", dresidual_out);
    p.dx = rows("dx_dtype", dx), p.dz = rows("z", dz);
    p.dresidual = rows("dresidual_dtype", dresidual);
    return {{&p.x, &x},
            {&p.z, &o.z},
            {&p.residual, &o.residual},
            {&p.dy, &dy},
            {&p.dresidual_out, &dresidual_out},
            {&p.dx, &dx},
            {&p.dz, &dz},
            {&p.dresidual, &dresidual}};
  }
  // As the operator returns them: empty where there is none.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> all(ScalarType compute) const;
};

}  // namespace statescan::bindings::norm
