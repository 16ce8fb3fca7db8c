#include "bindings/gated_rms_norm.h"
#include "gated_rms_norm/equations.h"

namespace statescan::bindings::norm {

using namespace gated_rms_norm;  // Shape, Rows, Gate

namespace {

constexpr const char* kSymbols = "(..., dim), that of x,";

}  // namespace

void check_like_x(const char* name, const OptionalTensor& t, const Tensor& x) {
  if (t) check_shape(name, *t, kSymbols, sizes_of(x));
}

Shape check(const Operands& o, const Options& options) {
  if (o.x.dim() < 1) fail("x must have shape (..., dim), got []");
  Shape p{};
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

Rows rows(const char* name, const OptionalTensor& t) {
  Rows v;
  if (t) v.data = t->data_ptr(), v.dtype = float_dtype(name, *t);
  return v;
}

void lay_out(Shape& p, const Tensor& x, const std::vector<Tensors>& all) {
  std::vector<Operand> operands;
  for (const Tensors& t : all) {
    if (*t.tensor) operands.push_back({t.view, (*t.tensor)->strides().data()});
  }
  const Sizes sizes = sizes_of(x);
  if (!merge_rows(p, int(x.dim()) - 1, sizes.data(), operands)) {
    fail("x and what has its shape must have at most " + std::to_string(kLead) +
         " dimensions in front of dim that cannot be merged, got shape " + to_string(sizes));
  }
}

Results::Results(const Operands& o, std::optional<ScalarType> out_dtype,
                 std::optional<ScalarType> residual_dtype, bool return_residual)
    : x(o.x), y(empty_like(o.x, out_dtype.value_or(o.x.scalar_type()))) {
  if (!return_residual) return;
  const Tensor& like = o.residual ? *o.residual : o.x;
  residual_out = empty_like(o.x, residual_dtype.value_or(like.scalar_type()));
}

std::tuple<Tensor, Tensor> Results::all() const {
  return {*y, residual_out ? *residual_out : empty(*x, {0}, x->scalar_type())};
}

Gradients::Gradients(const Operands& o, const OptionalTensor& dy,
                     const OptionalTensor& dresidual_out, ScalarType dx_dtype,
                     std::optional<ScalarType> dresidual_dtype)
    : dy(dy), dresidual_out(dresidual_out), x(o.x), dx(empty_like(o.x, dx_dtype)) {
  const auto like = [](const OptionalTensor& t) {
    return t ? OptionalTensor(empty_like(*t, t->scalar_type())) : std::nullopt;
  };
  dz = like(o.z), dweight = like(o.weight), dbias = like(o.bias);
  if (dresidual_dtype) dresidual = empty_like(o.x, *dresidual_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> Gradients::all(ScalarType compute) const {
  const auto or_empty = [&](const OptionalTensor& t) { return t ? *t : empty(*x, {0}, compute); };
  return {*dx, or_empty(dweight), or_empty(dbias), or_empty(dz), or_empty(dresidual)};
}

}  // namespace statescan::bindings::norm
