#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/device.h"
#include "bindings/gated_rms_norm.h"
#include "common/sum_partials.h"
#include "gated_rms_norm/equations.h"
#include "gated_rms_norm/kernels.h"

namespace statescan::bindings {
namespace {

using namespace gated_rms_norm;  // FwdParams, BwdParams, ...
using namespace norm;            // Operands, check, ...

// Lays out the rows, and says whether all of `all` can be read and written in place.
void lay_out(Problem& p, const Tensor& x, const std::vector<Tensors>& all) {
  norm::lay_out(p, x, all);
  const DType dtype = all[0].view->dtype;
  p.in_place = (dtype == DType::kFloat64) == (p.compute == DType::kFloat64);
  for (const Tensors& t : all) {
    if (!*t.tensor) continue;
    p.in_place = p.in_place && t.view->dtype == dtype && (t.view->stride[kLead] == 1 || p.dim == 1);
  }
}

std::tuple<Tensor, Tensor> gated_rms_norm_fwd(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& z, const OptionalTensor& residual, double eps, int64_t group_size,
    bool norm_before_gate, bool subtract_mean, std::optional<ScalarType> out_dtype,
    std::optional<ScalarType> residual_dtype, bool return_residual) {
  const Operands o{x, weight, bias, z, residual};
  FwdParams p{};
  static_cast<Shape&>(p) = check(o, {eps, group_size, norm_before_gate, subtract_mean});

  const Results results(o, out_dtype, residual_dtype, return_residual);
  lay_out(p, x, results.join(p, o));
  p.in_place = p.in_place && !residual && !return_residual;
  if (p.dim > 0) {
    run_tasks([](const FwdParams& q, const Range& r) { fwd(q, r); }, p, p.tasks(),
              p.scratch_bytes(), p.grain(p.tasks()));
  }
  return results.all();
}

// out[c] = sum over tasks of partial[task, which, c]
void add_up(const Tensor& partial, int64_t which, const BwdParams& p, const Tensor& out) {
  partials::SumParams s{};
  s.partial =
      static_cast<const char*>(partial.data_ptr()) + which * p.dim * element_bytes(p.compute);
  s.parts = partial.size(0), s.count = 2 * p.dim;
  s.compute = p.compute;
  s.size[0] = s.size[1] = s.size[2] = 1, s.size[3] = p.dim;
  s.out.data = out.data_ptr();
  s.out.dtype = float_dtype("gradient", out);
  s.out.stride[3] = out.stride(0);
  sum_partials(s);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_rms_norm_bwd(
    const OptionalTensor& dy, const OptionalTensor& dresidual_out, const Tensor& x,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& z,
    const OptionalTensor& residual, double eps, int64_t group_size, bool norm_before_gate,
    bool subtract_mean, ScalarType dx_dtype, std::optional<ScalarType> dresidual_dtype) {
  const Operands o{x, weight, bias, z, residual};
  BwdParams p{};
  static_cast<Shape&>(p) = check(o, {eps, group_size, norm_before_gate, subtract_mean});
  check_like_x("dy", dy, x);
  check_like_x("dresidual_out", dresidual_out, x);

  const ScalarType compute = scalar_type(p.compute);
  const Gradients gradients(o, dy, dresidual_out, dx_dtype, dresidual_dtype);
  lay_out(p, x, gradients.join(p, o));
  p.in_place = p.in_place && dy && !residual && !dresidual_out && !dresidual_dtype;
  const int64_t tasks = p.dim > 0 ? p.tasks() : 0;
  OptionalTensor partial;
  if (weight || bias) {  // without rows nothing writes the partial sums, and the gradients are zero
    const Sizes sizes{tasks > 0 ? tasks : 1, 2, p.dim};
    partial = tasks > 0 ? empty(x, sizes, compute) : zeros(x, sizes, compute);
    p.dparameters = partial->data_ptr();
  }
  run_tasks([](const BwdParams& q, const Range& r) { bwd(q, r); }, p, tasks, p.scratch_bytes(),
            p.grain(tasks));
  if (weight) add_up(*partial, 0, p, *gradients.dweight);
  if (bias) add_up(*partial, 1, p, *gradients.dbias);
  return gradients.all(compute);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("gated_rms_norm_fwd", TORCH_BOX(&gated_rms_norm_fwd));
  m.impl("gated_rms_norm_bwd", TORCH_BOX(&gated_rms_norm_bwd));
}

}  // namespace statescan::bindings
