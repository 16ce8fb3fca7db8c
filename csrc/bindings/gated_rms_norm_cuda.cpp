#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/gated_rms_norm.h"
#include "bindings/stream.h"
#include "gated_rms_norm/cuda.h"

namespace statescan::bindings {
namespace {

using namespace gated_rms_norm;  // cuda::FwdParams, ...
using namespace norm;            // Operands, check, ...

std::tuple<Tensor, Tensor> gated_rms_norm_fwd(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& z, const OptionalTensor& residual, double eps, int64_t group_size,
    bool norm_before_gate, bool subtract_mean, std::optional<ScalarType> out_dtype,
    std::optional<ScalarType> residual_dtype, bool return_residual) {
  const Operands o{x, weight, bias, z, residual};
  cuda::FwdParams p{};
  static_cast<Shape&>(p) = check(o, {eps, group_size, norm_before_gate, subtract_mean});
  const OnDevice device(x);
  const OptionalTensor y = empty_like(x, out_dtype ? *out_dtype : x.scalar_type());
  OptionalTensor sum;
  if (return_residual) {
    const ScalarType like = residual ? residual->scalar_type() : x.scalar_type();
    sum = empty_like(x, residual_dtype ? *residual_dtype : like);
  }
  const OptionalTensor in = x;
  p.weight = view<1>("weight", weight), p.bias = view<1>("bias", bias);
  p.x = rows("x", in), p.z = rows("z", z), p.residual = rows("residual", residual);
  p.y = rows("out_dtype", y), p.residual_out = rows("residual_dtype", sum);
  lay_out(p, x,
          {{&p.x, &in}, {&p.z, &z}, {&p.residual, &residual}, {&p.y, &y}, {&p.residual_out, &sum}});
  cuda::fwd(p, device.stream);
  return {*y, sum ? *sum : empty(x, {0}, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_rms_norm_bwd(
    const OptionalTensor& dy, const OptionalTensor& dresidual_out, const Tensor& x,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& z,
    const OptionalTensor& residual, double eps, int64_t group_size, bool norm_before_gate,
    bool subtract_mean, ScalarType dx_dtype, std::optional<ScalarType> dresidual_dtype) {
  const Operands o{x, weight, bias, z, residual};
  cuda::BwdParams p{};
  static_cast<Shape&>(p) = check(o, {eps, group_size, norm_before_gate, subtract_mean});
  check_like_x("dy", dy, x);
  check_like_x("dresidual_out", dresidual_out, x);
  for (const auto& [name, t] : {std::pair("dy", &dy), std::pair("dresidual_out", &dresidual_out)}) {
    if (*t) check_same_device(name, **t, x);
  }

  const OnDevice device(x);
  const ScalarType compute = scalar_type(p.compute);
  const auto absent = [&] { return empty(x, {0}, compute); };
  const OptionalTensor dx = empty_like(x, dx_dtype);
  OptionalTensor dz, dresidual;
  if (z) dz = empty_like(*z, z->scalar_type());
  if (dresidual_dtype) dresidual = empty_like(x, *dresidual_dtype);
  const Tensor dweight = weight ? empty_like(*weight, weight->scalar_type()) : absent();
  const Tensor dbias = bias ? empty_like(*bias, bias->scalar_type()) : absent();
  const OptionalTensor in = x;
  p.weight = view<1>("weight", weight), p.bias = view<1>("bias", bias);
  p.x = rows("x", in), p.z = rows("z", z), p.residual = rows("residual", residual);
  p.dy = rows("dy", dy), p.dresidual_out = rows("dresidual_out", dresidual_out);
  p.dx = rows("dx_dtype", dx), p.dz = rows("z", dz),
  p.dresidual = rows("dresidual_dtype", dresidual);
  lay_out(p, x,
          {{&p.x, &in},
           {&p.z, &z},
           {&p.residual, &residual},
           {&p.dy, &dy},
           {&p.dresidual_out, &dresidual_out},
           {&p.dx, &dx},
           {&p.dz, &dz},
           {&p.dresidual, &dresidual}});
  if (weight) p.dweight = view<1>("weight", dweight);
  if (bias) p.dbias = view<1>("bias", dbias);
  OptionalTensor partial;
  if (p.dim > 0 && p.rows > 0 && (weight || bias)) {
    partial = empty(x, {p.parts(), 2, p.dim}, compute);
    p.partial = partial->data_ptr();
  }
  cuda::bwd(p, device.stream);
  return {*dx, dweight, dbias, dz ? *dz : absent(), dresidual ? *dresidual : absent()};
}

}  // namespace

STATESCAN_CUDA_IMPL(m) {
  m.impl("gated_rms_norm_fwd", TORCH_BOX(&gated_rms_norm_fwd));
  m.impl("gated_rms_norm_bwd", TORCH_BOX(&gated_rms_norm_bwd));
}

}  // namespace statescan::bindings
