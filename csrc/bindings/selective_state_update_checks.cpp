#include <algorithm>

#include "bindings/selective_state_update.h"

namespace statescan::bindings {

using selective_state_update::Shape;

namespace {

// A call takes a few microseconds, and a model makes one for every layer and token: what is checked
// here is compared in place, and words are made only for an error.
using Operands = UpdateArguments;

// What the shapes of the state and of x say: Mamba-1 or Mamba-2, one token or several.
struct Form {
  bool heads, tokens;
  int64_t batch, length, head, headdim, dim, state;

  std::string symbols(const char* last) const {
    return std::string(tokens ? "(batch, tokens, " : "(batch, ") + last + ")";
  }
  Sizes sizes(std::initializer_list<int64_t> last) const {
    Sizes all = tokens ? Sizes{batch, length} : Sizes{batch};
    all.insert(all.end(), last);
    return all;
  }
};

bool has_shape(const Tensor& t, std::initializer_list<int64_t> expected) {
  const auto sizes = t.sizes();
  return sizes.size() == expected.size() &&
         std::equal(expected.begin(), expected.end(), sizes.begin());
}

Form form_of(const Operands& x) {
  const int64_t state_dim = x.state.dim(), x_dim = x.x.dim();
  if (state_dim != 3 && state_dim != 4) {
    fail("state must have shape (slots, dim, state) or (slots, head, headdim, state), got " +
         to_string(sizes_of(x.state)));
  }
  Form f{};
  f.heads = state_dim == 4;
  f.tokens = x_dim == state_dim;
  if (!f.tokens && x_dim != state_dim - 1) {
    fail(std::string("x must have shape ") +
         (f.heads ? "(batch, head, headdim) or (batch, tokens, head, headdim)"
                  : "(batch, dim) or (batch, tokens, dim)") +
         " with this state, got " + to_string(sizes_of(x.x)));
  }
  f.batch = x.x.size(0);
  f.length = f.tokens ? x.x.size(1) : 1;
  f.state = x.state.size(state_dim - 1);
  if (f.heads) {
    f.head = x.state.size(1), f.headdim = x.state.size(2);
  } else {
    f.dim = x.state.size(1);
  }
  return f;
}

[[noreturn]] void fail_shape(const char* name, const Tensor& t, const std::string& symbols,
                             const Sizes& expected) {
  fail(std::string(name) + " must have shape " + symbols + " = " + to_string(expected) + ", got " +
       to_string(sizes_of(t)));
}

bool is_tokenwise(const Tensor& t, const Form& f, std::initializer_list<int64_t> last) {
  const auto sizes = t.sizes();
  const size_t lead = f.tokens ? 2 : 1;
  if (sizes.size() != lead + last.size() || sizes[0] != f.batch) return false;
  if (f.tokens && sizes[1] != f.length) return false;
  return std::equal(last.begin(), last.end(), sizes.begin() + lead);
}

// x, dt or z
void check_tokenwise(const char* name, const Tensor& t, const Form& f, bool per_head = false) {
  if (!f.heads) {
    if (!is_tokenwise(t, f, {f.dim})) fail_shape(name, t, f.symbols("dim"), f.sizes({f.dim}));
    return;
  }
  if (is_tokenwise(t, f, {f.head, f.headdim})) return;
  if (per_head && is_tokenwise(t, f, {f.head})) return;
  fail_shape(name, t, f.symbols(per_head ? "head[, headdim]" : "head, headdim"),
             f.sizes({f.head, f.headdim}));
}

// D or dt_bias
void check_parameter(const char* name, const OptionalTensor& t, const Form& f) {
  if (!t) return;
  if (!f.heads) {
    if (!has_shape(*t, {f.dim})) fail_shape(name, *t, "(dim)", {f.dim});
  } else if (!has_shape(*t, {f.head}) && !has_shape(*t, {f.head, f.headdim})) {
    fail_shape(name, *t, "(head[, headdim])", {f.head, f.headdim});
  }
}

void check_A(const Tensor& A, const Form& f) {
  if (!f.heads) {
    if (!has_shape(A, {f.dim, f.state})) fail_shape("A", A, "(dim, state)", {f.dim, f.state});
  } else if (!has_shape(A, {f.head}) && !has_shape(A, {f.head, f.headdim, f.state})) {
    fail_shape("A", A, "(head[, headdim, state])", {f.head, f.headdim, f.state});
  }
}

int64_t groups_of(const Operands& x, const Form& f) {
  const int64_t grouped = f.tokens ? 4 : 3;
  for (const Tensor* t : {&x.B, &x.C}) {
    if (t->dim() == grouped) return t->size(grouped - 2);
  }
  return 1;
}

void check_projection(const char* name, const Tensor& t, const Form& f, int64_t groups) {
  if (is_tokenwise(t, f, {groups, f.state}) || is_tokenwise(t, f, {f.state})) return;
  fail_shape(name, t, f.symbols("[group, ]state"), f.sizes({groups, f.state}));
}

void check(const Operands& x, const Form& f, int64_t groups) {
  check_tokenwise("x", x.x, f);
  check_tokenwise("dt", x.dt, f, true);
  if (x.z) check_tokenwise("z", *x.z, f);
  check_A(x.A, f);
  check_parameter("D", x.D, f);
  check_parameter("dt_bias", x.dt_bias, f);
  if (f.state < 1) fail("state must have at least 1 number for each row, got state = 0");
  const int64_t rows = f.heads ? f.head : f.dim;
  if (groups < 1 || rows % groups != 0) {
    fail(std::string("B and C must have a number of groups that divides ") +
         (f.heads ? "head = " : "dim = ") + std::to_string(rows) + ", got " +
         std::to_string(groups));
  }
  check_projection("B", x.B, f, groups);
  check_projection("C", x.C, f, groups);
  check_not_expanded("state", x.state);
}

// A view of t without data, to be given strides.
template <int kRank>
View<kRank> bare(const char* name, const Tensor& t) {
  View<kRank> v;
  v.data = t.data_ptr();
  v.dtype = float_dtype(name, t);
  return v;
}

// Strides of `count` dimensions of t that belong to rows, as (head, headdim). Mamba-1 has one,
// (dim), which falls into heads of headdim channels; a tensor per head serves all its headdim.
struct RowStrides {
  int64_t head, headdim;
};

RowStrides row_strides(const Tensor& t, int64_t first, bool whole, const Form& f, const Shape& p) {
  const auto strides = t.strides();
  RowStrides s{};
  if (!f.heads) {
    s = {strides[first] * p.headdim, strides[first]};
  } else {
    s = {strides[first], whole ? strides[first + 1] : 0};
  }
  if (p.headdim == 1) s.headdim = 0;  // so that one row counts as tied
  return s;
}

View<4> tokenwise_view(const char* name, const Tensor& t, const Form& f, const Shape& p) {
  View<4> v = bare<4>(name, t);
  const int64_t first = f.tokens ? 2 : 1;
  const RowStrides s = row_strides(t, first, t.dim() == first + 2, f, p);
  v.stride[0] = t.stride(0), v.stride[1] = f.tokens ? t.stride(1) : 0;
  v.stride[2] = s.head, v.stride[3] = s.headdim;
  return v;
}

View<2> parameter_view(const char* name, const OptionalTensor& t, const Form& f, const Shape& p) {
  if (!t) return {};
  View<2> v = bare<2>(name, *t);
  const RowStrides s = row_strides(*t, 0, t->dim() == 2, f, p);
  v.stride[0] = s.head, v.stride[1] = s.headdim;
  return v;
}

View<3> A_view(const Tensor& A, const Form& f, const Shape& p) {
  View<3> v = bare<3>("A", A);
  const bool whole = A.dim() > 1;
  const RowStrides s = row_strides(A, 0, whole, f, p);
  v.stride[0] = s.head, v.stride[1] = s.headdim;
  v.stride[2] = whole && p.state > 1 ? A.stride(A.dim() - 1) : 0;
  return v;
}

View<4> projection_view(const char* name, const Tensor& t, const Form& f) {
  View<4> v = bare<4>(name, t);
  const int64_t first = f.tokens ? 2 : 1;
  v.stride[0] = t.stride(0), v.stride[1] = f.tokens ? t.stride(1) : 0;
  v.stride[2] = t.dim() == first + 2 ? t.stride(first) : 0;
  v.stride[3] = t.stride(t.dim() - 1);
  return v;
}

View<4> state_view(const Tensor& state, const Form& f, const Shape& p) {
  View<4> v = bare<4>("state", state);
  const RowStrides s = row_strides(state, 1, true, f, p);
  v.stride[0] = state.stride(0), v.stride[1] = s.head, v.stride[2] = s.headdim;
  v.stride[3] = p.state > 1 ? state.stride(state.dim() - 1) : 1;
  return v;
}

void fill(Shape& p, const Operands& x, const Form& f) {
  p.h = state_view(x.state, f, p);
  p.x = tokenwise_view("x", x.x, f, p);
  p.dt = tokenwise_view("dt", x.dt, f, p);
  p.A = A_view(x.A, f, p);
  p.B = projection_view("B", x.B, f);
  p.C = projection_view("C", x.C, f);
  p.D = parameter_view("D", x.D, f, p);
  if (x.z) p.z = tokenwise_view("z", *x.z, f, p);
  p.dt_bias = parameter_view("dt_bias", x.dt_bias, f, p);
  p.compute = DType::kFloat32;
  for (DType t : {p.h.dtype, p.x.dtype, p.dt.dtype, p.A.dtype, p.B.dtype, p.C.dtype, p.D.dtype,
                  p.z.dtype, p.dt_bias.dtype}) {
    if (t == DType::kFloat64) p.compute = t;
  }
}

void check_device(const Operands& x) {
  check_same_device("x", x.x, x.state), check_same_device("dt", x.dt, x.state);
  check_same_device("A", x.A, x.state), check_same_device("B", x.B, x.state);
  check_same_device("C", x.C, x.state);
  if (x.D) check_same_device("D", *x.D, x.state);
  if (x.z) check_same_device("z", *x.z, x.state);
  if (x.dt_bias) check_same_device("dt_bias", *x.dt_bias, x.state);
}

void check_slots(const Operands& x, const Form& f, int64_t slots) {
  if (x.slots) {
    check_shape("state_batch_indices", *x.slots, "(batch)", {f.batch});
  } else if (slots != f.batch) {
    fail("state must have a slot for each of batch = " + std::to_string(f.batch) +
         " elements unless state_batch_indices says which, got slots = " + std::to_string(slots));
  }
}

}  // namespace

Shape check(const UpdateArguments& x) {
  const Form f = form_of(x);
  Shape p{};
  p.groups = groups_of(x, f);
  check(x, f, p.groups);
  check_device(x);
  p.slots = x.state.size(0);
  check_slots(x, f, p.slots);
  if (!(x.dt_min <= x.dt_max)) {
    fail("dt_limit must be (least, greatest), got (" + std::to_string(x.dt_min) + ", " +
         std::to_string(x.dt_max) + ")");
  }
  p.batch = f.batch, p.tokens = f.length, p.state = f.state;
  p.heads = f.heads ? f.head : p.groups;
  p.headdim = f.heads ? f.headdim : f.dim / p.groups;
  p.dt_softplus = x.dt_softplus, p.dt_min = x.dt_min, p.dt_max = x.dt_max;
  p.compute_output = x.compute_output;
  fill(p, x, f);
  return p;
}

Tensor output(const UpdateArguments& x, std::optional<ScalarType> out_dtype, Shape& p) {
  const ScalarType dtype = out_dtype ? *out_dtype : x.x.scalar_type();
  Tensor y = p.compute_output ? empty(x.x, sizes_of(x.x), dtype) : empty(x.x, {0}, dtype);
  if (p.compute_output) p.y = tokenwise_view("out_dtype", y, form_of(x), p);
  return y;
}

}  // namespace statescan::bindings
