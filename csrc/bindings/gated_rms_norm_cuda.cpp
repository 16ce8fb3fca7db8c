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
  const Results results(o, out_dtype, residual_dtype, return_residual);
  lay_out(p, x, results.join(p, o));
  cuda::fwd(p, device.stream);
  return results.all();
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
  const Gradients gradients(o, dy, dresidual_out, dx_dtype, dresidual_dtype);
  lay_out(p, x, gradients.join(p, o));
  p.dweight = view<1>("weight", gradients.dweight), p.dbias = view<1>("bias", gradients.dbias);
  OptionalTensor partial;
  if (p.dim > 0 && p.rows > 0 && (weight || bias)) {
    partial = empty(x, {p.parts(), 2, p.dim}, compute);
    p.partial = partial->data_ptr();
  }
  cuda::bwd(p, device.stream);
  return gradients.all(compute);
}

}  // namespace

STATESCAN_CUDA_IMPL(m) {
  m.impl("gated_rms_norm_fwd", TORCH_BOX(&gated_rms_norm_fwd));
  m.impl("gated_rms_norm_bwd", TORCH_BOX(&gated_rms_norm_bwd));
}

}  // namespace statescan::bindings
