#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "bindings/device.h"
#include "bindings/tensor.h"
#include "selective_state_update/kernels.h"

namespace statescan::bindings {
namespace {

using selective_state_update::Params;

// A call takes a few microseconds, and a model makes one for every layer and token: what is checked
// here is compared in place, and words are made only for an error.
struct Operands {
  const Tensor &state, &x, &dt, &A, &B, &C;
  const OptionalTensor &D, &z, &dt_bias, &slots;
};

bool has_shape(const Tensor& t, std::initializer_list<int64_t> expected) {
  const auto sizes = t.sizes();
  return sizes.size() == expected.size() &&
         std::equal(expected.begin(), expected.end(), sizes.begin());
}

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

// The slot of each batch element. fail unless every element has one of its own.
std::vector<int64_t> slots_of(const Operands& x, const Form& f) {
  const int64_t slots = x.state.size(0);
  if (!x.slots) {
    if (slots != f.batch) {
      fail("state must have a slot for each of batch = " + std::to_string(f.batch) +
           " elements unless state_batch_indices says which, got slots = " + std::to_string(slots));
    }
    return {};
  }
  return slot_indices("state_batch_indices", *x.slots, f.batch, slots);
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

RowStrides row_strides(const Tensor& t, int64_t first, bool whole, const Form& f, const Params& p) {
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

View<4> tokenwise_view(const char* name, const Tensor& t, const Form& f, const Params& p) {
  View<4> v = bare<4>(name, t);
  const int64_t first = f.tokens ? 2 : 1;
  const RowStrides s = row_strides(t, first, t.dim() == first + 2, f, p);
  v.stride[0] = t.stride(0), v.stride[1] = f.tokens ? t.stride(1) : 0;
  v.stride[2] = s.head, v.stride[3] = s.headdim;
  return v;
}

View<2> parameter_view(const char* name, const OptionalTensor& t, const Form& f, const Params& p) {
  if (!t) return {};
  View<2> v = bare<2>(name, *t);
  const RowStrides s = row_strides(*t, 0, t->dim() == 2, f, p);
  v.stride[0] = s.head, v.stride[1] = s.headdim;
  return v;
}

View<3> A_view(const Tensor& A, const Form& f, const Params& p) {
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

View<4> state_view(const Tensor& state, const Form& f, const Params& p) {
  View<4> v = bare<4>("state", state);
  const RowStrides s = row_strides(state, 1, true, f, p);
  v.stride[0] = state.stride(0), v.stride[1] = s.head, v.stride[2] = s.headdim;
  v.stride[3] = p.state > 1 ? state.stride(state.dim() - 1) : 1;
  return v;
}

void fill(Params& p, const Operands& x, const Form& f) {
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
  check_cpu("state", x.state), check_cpu("x", x.x), check_cpu("dt", x.dt), check_cpu("A", x.A);
  check_cpu("B", x.B), check_cpu("C", x.C);
  if (x.D) check_cpu("D", *x.D);
  if (x.z) check_cpu("z", *x.z);
  if (x.dt_bias) check_cpu("dt_bias", *x.dt_bias);
}

// Tasks that a thread takes at once. A number of the state whose decay needs an exponential of its own
// weighs as much as four that share one. Up to 256 K of the latter (20 us) a second thread costs more
// than it brings; beyond, 64 shares are even enough, and neighbours in a share reuse B and C.
int64_t grain(const Params& p) {
  const int64_t numbers = p.batch * p.tokens * p.heads * p.headdim * p.state;
  const int64_t weight = p.A.stride[2] == 0 ? 1 : 4;
  return numbers * weight <= (1 << 18) ? p.tasks() : p.tasks() / 64 + 1;
}

Tensor selective_state_update(const Tensor& state, const Tensor& x, const Tensor& dt,
                              const Tensor& A, const Tensor& B, const Tensor& C,
                              const OptionalTensor& D, const OptionalTensor& z,
                              const OptionalTensor& dt_bias,
                              const OptionalTensor& state_batch_indices, bool dt_softplus,
                              double dt_min, double dt_max, bool compute_output,
                              std::optional<ScalarType> out_dtype) {
  const Operands in{state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices};
  const Form f = form_of(in);
  Params p{};
  p.groups = groups_of(in, f);
  check(in, f, p.groups);
  check_device(in);
  const std::vector<int64_t> slots = slots_of(in, f);
  if (!(dt_min <= dt_max)) {
    fail("dt_limit must be (least, greatest), got (" + std::to_string(dt_min) + ", " +
         std::to_string(dt_max) + ")");
  }
  p.batch = f.batch, p.tokens = f.length, p.state = f.state;
  p.heads = f.heads ? f.head : p.groups;
  p.headdim = f.heads ? f.headdim : f.dim / p.groups;
  p.dt_softplus = dt_softplus, p.dt_min = dt_min, p.dt_max = dt_max;
  p.compute_output = compute_output;
  p.slots = state_batch_indices ? slots.data() : nullptr;
  fill(p, in, f);

  const ScalarType dtype = out_dtype ? *out_dtype : x.scalar_type();
  Tensor y = compute_output ? empty(x, sizes_of(x), dtype) : empty(x, {0}, dtype);
  if (compute_output) p.y = tokenwise_view("out_dtype", y, f, p);

  run_tasks([](const Params& q, const Range& r) { update(q, r); }, p, p.tasks(), p.scratch_bytes(),
            grain(p));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("selective_state_update", TORCH_BOX(&selective_state_update));
}

}  // namespace statescan::bindings
