#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/device.h"
#include "bindings/tensor.h"
#include "common/sum_partials.h"
#include "gated_rms_norm/equations.h"
#include "gated_rms_norm/kernels.h"

namespace statescan::bindings {
namespace {

using namespace gated_rms_norm;  // FwdParams, BwdParams, ...

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

constexpr const char* kSymbols = "(..., dim), that of x,";

void check_like_x(const char* name, const OptionalTensor& t, const Tensor& x) {
  if (t) check_shape(name, *t, kSymbols, sizes_of(x));
}

// Sizes and flags from the operands, all of them checked.
Problem check(const Operands& o, const Options& options) {
  if (o.x.dim() < 1) fail("x must have shape (..., dim), got []");
  Problem p{};
  p.dim = o.x.size(o.x.dim() - 1);
  p.rows = 1;
  for (int64_t i = 0; i + 1 < o.x.dim(); ++i) p.rows *= o.x.size(i);
  if (o.weight) check_shape("weight", *o.weight, "(dim)", {p.dim});
  if (o.bias) check_shape("bias", *o.bias, "(dim)", {p.dim});
  check_like_x("z", o.z, o.x);
  check_like_x("residual", o.residual, o.x);
  p.group_size = options.group_size;
  if (p.dim > 0 && (p.group_size < 1 || p.dim % p.group_size != 0)) {
    fail("group_size must divide dim = " + std::to_string(p.dim) + ", got " +
         std::to_string(p.group_size));
  }
  if (!(options.eps >= 0)) fail("eps must be at least 0, got " + std::to_string(options.eps));
  p.gate = !o.z ? Gate::kNone : options.norm_before_gate ? Gate::kAfter : Gate::kBefore;
  p.subtract_mean = options.subtract_mean;
  p.eps = options.eps;
  p.compute = compute_dtype({{"x", &o.x},
                             {"weight", pointer(o.weight)},
                             {"bias", pointer(o.bias)},
                             {"z", pointer(o.z)},
                             {"residual", pointer(o.residual)}});
  return p;
}

// A tensor of (..., dim), to be given strides by lay_out.
Rows rows(const char* name, const OptionalTensor& t) {
  Rows v;
  if (t) v.data = t->data_ptr(), v.dtype = float_dtype(name, *t);
  return v;
}

// The rows of x and of all that has its shape (data: absent or not).
struct Tensors {
  Rows* view;
  const OptionalTensor* tensor;
};

// Fills strides and leading sizes, and says whether all of `all` can be read and written in place.
void lay_out(Problem& p, const Tensor& x, const std::vector<Tensors>& all) {
  std::vector<Operand> operands;
  p.in_place = true;
  for (const Tensors& t : all) {
    if (!*t.tensor) continue;
    operands.push_back({t.view, (*t.tensor)->strides().data()});
    p.in_place = p.in_place && t.view->dtype == all[0].view->dtype;
  }
  const Sizes sizes = sizes_of(x);
  if (!merge_rows(p, int(x.dim()) - 1, sizes.data(), operands)) {
    fail("x and what has its shape must have at most " + std::to_string(kLead) +
         " dimensions in front of dim that cannot be merged, got shape " + to_string(sizes));
  }
  for (const Operand& o : operands) {
    p.in_place = p.in_place && (o.view->stride[kLead] == 1 || p.dim == 1);
  }
  const bool wide = all[0].view->dtype == DType::kFloat64;
  p.in_place = p.in_place && wide == (p.compute == DType::kFloat64);
}

// Rows that a thread takes at once hold some 16000 elements: to wake another costs as much.
int64_t grain(const Problem& p, int64_t tasks) { return p.rows * p.dim <= 16384 ? tasks : 1; }

std::tuple<Tensor, Tensor> gated_rms_norm_fwd(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& z, const OptionalTensor& residual, double eps, int64_t group_size,
    bool norm_before_gate, bool subtract_mean, std::optional<ScalarType> out_dtype,
    std::optional<ScalarType> residual_dtype, bool return_residual) {
  const Operands o{x, weight, bias, z, residual};
  FwdParams p{};
  static_cast<Problem&>(p) = check(o, {eps, group_size, norm_before_gate, subtract_mean});

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
  p.in_place = p.in_place && !residual && !return_residual;
  if (p.dim > 0) {
    run_tasks([](const FwdParams& q, const Range& r) { fwd(q, r); }, p, p.tasks(),
              p.scratch_bytes(), grain(p, p.tasks()));
  }
  return {*y, sum ? *sum : empty(x, {0}, x.scalar_type())};
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
  static_cast<Problem&>(p) = check(o, {eps, group_size, norm_before_gate, subtract_mean});
  check_like_x("dy", dy, x);
  check_like_x("dresidual_out", dresidual_out, x);

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
  p.in_place = p.in_place && dy && !residual && !dresidual_out && !dresidual;
  const int64_t tasks = p.dim > 0 ? p.tasks() : 0;
  OptionalTensor partial;
  if (weight || bias) {  // without rows nothing writes the partial sums, and the gradients are zero
    const Sizes sizes{tasks > 0 ? tasks : 1, 2, p.dim};
    partial = tasks > 0 ? empty(x, sizes, compute) : zeros(x, sizes, compute);
    p.dparameters = partial->data_ptr();
  }
  run_tasks([](const BwdParams& q, const Range& r) { bwd(q, r); }, p, tasks, p.scratch_bytes(),
            grain(p, tasks));
  if (weight) add_up(*partial, 0, p, dweight);
  if (bias) add_up(*partial, 1, p, dbias);
  return {*dx, dweight, dbias, dz ? *dz : absent(), dresidual ? *dresidual : absent()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("gated_rms_norm_fwd", TORCH_BOX(&gated_rms_norm_fwd));
  m.impl("gated_rms_norm_bwd", TORCH_BOX(&gated_rms_norm_bwd));
}

}  // namespace statescan::bindings
