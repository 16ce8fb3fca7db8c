#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "bindings/device.h"
#include "bindings/tensor.h"
#include "common/sum_partials.h"
#include "selective_scan_2d/kernels.h"

namespace statescan::bindings {
namespace {

using namespace selective_scan_2d;  // FwdParams, BwdParams, ...

// The operands that forward and backward share.
struct Operands {
  const Tensor &u, &delta, &A, &B, &C;
  const OptionalTensor &D, &z, &delta_bias, &dt_weight, &weights, &initial_state;
  const Tensor& index;
};

template <class T>
void check_tokens(const Tensor& index, int64_t tokens) {
  const T* data = static_cast<const T*>(index.data_ptr());
  if (index.size(0) == 0 || index.size(2) == 0) return;
  T least = data[0], greatest = data[0];
  for (int64_t b = 0; b < index.size(0); ++b) {
    for (int64_t k = 0; k < index.size(1); ++k) {
      const T* row = data + b * index.stride(0) + k * index.stride(1);
      for (int64_t t = 0; t < index.size(2); ++t) {
        least = std::min(least, row[t * index.stride(2)]);
        greatest = std::max(greatest, row[t * index.stride(2)]);
      }
    }
  }
  if (least >= -2 && int64_t(greatest) < tokens) return;
  fail("routes must hold -2, -1 or a token below " + std::to_string(tokens) + ", got values from " +
       std::to_string(least) + " to " + std::to_string(greatest));
}

// Steps, routes and their tokens.
void check_index(const Tensor& index, Problem& p) {
  check_cpu("routes", index);
  check_dim("routes", index, "(batch or 1, route, step)", 3);
  p.routes = index.size(1), p.steps = index.size(2);
  if (p.routes < 1) fail("routes must hold at least one route");
  if (index.size(0) != 1) {
    check_shape("routes", index, "(batch, route, step)", {p.batch, p.routes, p.steps});
  }
  p.index = index.data_ptr();
  for (int i = 0; i < 3; ++i) p.index_stride[i] = index.size(i) == 1 ? 0 : index.stride(i);
  p.index_is_wide = index.scalar_type() == ScalarType::Long;
  if (p.index_is_wide) return check_tokens<int64_t>(index, p.tokens);
  if (index.scalar_type() != ScalarType::Int) fail("routes must be int32 or int64");
  check_tokens<int32_t>(index, p.tokens);
}

// fail unless t has one row for all routes or one for each: sizes {batch, 1 or K, ...}.
void check_routed(const char* name, const Tensor& t, const char* symbols, Sizes expected) {
  if (t.dim() == 4 && t.size(1) == 1) expected[1] = 1;
  check_shape(name, t, symbols, expected);
}

// fail unless t has `rows` rows for all routes or for each: (rows) or (K rows).
void check_parameter(const char* name, const Tensor& t, const char* symbols, const Problem& p,
                     int64_t rows, Sizes rest = {}) {
  rest.insert(rest.begin(), t.dim() > 0 && t.size(0) == rows ? rows : p.routes * rows);
  check_shape(name, t, symbols, rest);
}

void check_delta(const Operands& x, Problem& p) {
  check_dim("delta", x.delta, "(batch, route or 1, row, step)", 4);
  const int64_t rows = x.delta.size(2);
  check_routed("delta", x.delta, "(batch, route or 1, row, step)",
               {p.batch, p.routes, rows, p.steps});
  p.delta_shared = x.delta.size(1) == 1 && p.routes > 1;
  p.delta_repeat = 1;
  if (x.dt_weight) {
    p.rank = rows;
    check_dim("dt_weight", *x.dt_weight, "(route or 1, dim, rank)", 3);
    const int64_t routes = x.dt_weight->size(0) == 1 ? 1 : p.routes;
    check_shape("dt_weight", *x.dt_weight, "(route or 1, dim, rank)", {routes, p.dim, rows});
    if (rows < 1) fail("dt_weight must have shape (route or 1, dim, rank) with rank of at least 1");
  } else {
    if (rows < 1 ? p.dim != rows : p.dim % rows != 0) {
      fail("delta must have a number of rows that divides dim = " + std::to_string(p.dim) +
           ", got " + std::to_string(rows));
    }
    if (rows > 0) p.delta_repeat = p.dim / rows;
  }
  if (x.delta_bias) {
    check_parameter("delta_bias", *x.delta_bias, "(row) or (route * row)", p,
                    x.dt_weight ? p.dim : rows);
  }
}

// (route, row) of a parameter that is (row) for all routes or (route * row).
View<2> parameter_view(const char* name, const OptionalTensor& t, int64_t rows) {
  View<2> v;
  if (!t) return v;
  v.data = t->data_ptr();
  v.dtype = float_dtype(name, *t);
  v.stride[0] = t->size(0) == rows ? 0 : rows * t->stride(0);
  v.stride[1] = t->stride(0);
  return v;
}

View<4> routed_view(const char* name, const Tensor& t) {
  View<4> v = view<4>(name, t);
  if (t.size(1) == 1) v.stride[1] = 0;
  return v;
}

// Sizes and flags from the operands, all of them checked, and their views.
Problem check(const Operands& x, int64_t reset_period, bool carry, bool delta_softplus, bool merge,
              int64_t chunk) {
  check_dim("u", x.u, "(batch, route or 1, dim, token)", 4);
  check_dim("A", x.A, "(dim, state) or (route * dim, state)", 2);
  Problem p{};
  p.batch = x.u.size(0), p.dim = x.u.size(2), p.tokens = x.u.size(3), p.state = x.A.size(1);
  p.reset_period = reset_period, p.carry = carry, p.delta_softplus = delta_softplus;
  p.chunk = chunk, p.y_per_route = !merge;
  if (p.tokens > kMaxTokens) {
    fail("u must have at most " + std::to_string(kMaxTokens) + " tokens, got " +
         std::to_string(p.tokens));
  }
  check_index(x.index, p);
  check_routed("u", x.u, "(batch, route or 1, dim, token)", {p.batch, p.routes, p.dim, p.tokens});
  p.u_per_route = x.u.size(1) > 1;
  check_delta(x, p);
  check_parameter("A", x.A, "(dim, state) or (route * dim, state)", p, p.dim, {p.state});
  if (p.state < 1) fail("A must have shape (dim, state) with state of at least 1, got state = 0");
  for (const auto& [name, t] : {std::pair("B", &x.B), {"C", &x.C}}) {
    check_routed(name, *t, "(batch, route or 1, state, step)",
                 {p.batch, p.routes, p.state, p.steps});
  }
  if (x.D) check_parameter("D", *x.D, "(dim) or (route * dim)", p, p.dim);
  if (x.z) check_shape("z", *x.z, "(batch, dim, token)", {p.batch, p.dim, p.tokens});
  if (x.weights) check_shape("weights", *x.weights, "(route, dim)", {p.routes, p.dim});
  if (p.y_per_route && (x.z || x.weights)) fail("z and weights are for merged routes only");
  if (x.initial_state) {
    check_shape("initial_state", *x.initial_state, "(batch, route, dim, state)",
                {p.batch, carry ? 1 : p.routes, p.dim, p.state});
  }
  if (reset_period < 0) fail("reset_period must not be negative");
  if (chunk < 1 || chunk > kMaxChunk) {
    fail("chunk must be from 1 to " + std::to_string(kMaxChunk) + ", got " + std::to_string(chunk));
  }
  p.compute = compute_dtype({{"u", &x.u},
                             {"delta", &x.delta},
                             {"A", &x.A},
                             {"B", &x.B},
                             {"C", &x.C},
                             {"D", pointer(x.D)},
                             {"z", pointer(x.z)},
                             {"delta_bias", pointer(x.delta_bias)},
                             {"dt_weight", pointer(x.dt_weight)},
                             {"weights", pointer(x.weights)},
                             {"initial_state", pointer(x.initial_state)}});
  p.u = routed_view("u", x.u);
  p.delta = routed_view("delta", x.delta);
  p.B = routed_view("B", x.B);
  p.C = routed_view("C", x.C);
  const View<2> A = view<2>("A", x.A);
  p.A = {
      A.data, A.dtype, {x.A.size(0) == p.dim ? 0 : p.dim * A.stride[0], A.stride[0], A.stride[1]}};
  p.dt_weight = view<3>("dt_weight", x.dt_weight);
  if (x.dt_weight && x.dt_weight->size(0) == 1) p.dt_weight.stride[0] = 0;
  p.D = parameter_view("D", x.D, p.dim);
  p.delta_bias =
      parameter_view("delta_bias", x.delta_bias, p.dim / std::max<int64_t>(p.delta_repeat, 1));
  p.weights = view<2>("weights", x.weights);
  p.z = view<3>("z", x.z);
  p.initial_state = view<4>("initial_state", x.initial_state);
  return p;
}

// (batch, route, dim, token) with channels innermost if `like` has them so.
Tensor empty_tokens(const Tensor& like, Sizes sizes, ScalarType dtype) {
  if (like.stride(2) >= like.stride(3)) return empty(like, sizes, dtype);
  std::swap(sizes[2], sizes[3]);
  return torch::stable::transpose(empty(like, sizes, dtype), 2, 3);
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_2d_fwd(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& dt_weight, const OptionalTensor& weights,
    const OptionalTensor& initial_state, const Tensor& index, int64_t reset_period, bool carry,
    bool delta_softplus, bool merge, std::optional<ScalarType> out_dtype, int64_t chunk,
    bool save_chunk_states) {
  const Operands x{u, delta, A, B, C, D, z, delta_bias, dt_weight, weights, initial_state, index};
  FwdParams p{};
  static_cast<Problem&>(p) = check(x, reset_period, carry, delta_softplus, merge, chunk);
  const ScalarType compute = scalar_type(p.compute);
  Tensor y = empty_tokens(u, {p.batch, merge ? 1 : p.routes, p.dim, p.tokens},
                          out_dtype ? *out_dtype : u.scalar_type());
  Tensor last_state = empty(u, {p.batch, carry ? 1 : p.routes, p.dim, p.state}, compute);
  Tensor chunk_states =
      empty(u, save_chunk_states ? Sizes{p.batch, p.routes, p.chunks(), p.state, p.dim} : Sizes{0},
            compute);
  p.y = view<4>("out_dtype", y);
  p.last_state = view<4>("last_state", last_state);
  if (save_chunk_states) p.chunk_states = chunk_states.data_ptr();
  run_tasks([](const FwdParams& q, const Range& r) { fwd(q, r); }, p, p.tasks(), p.scratch_bytes());
  return {y, last_state, chunk_states};
}

// Partial sums of sizes (part, route, i, j, k) added up over the parts, and over the routes where
// they share what this is the gradient of. `out` has strides of (route, i, j, k).
void add_up(const Tensor& partial, const Problem& p, bool shared, const Sizes& sizes, View<4> out) {
  partials::SumParams sum{};
  sum.compute = p.compute;
  sum.parts = partial.size(0) * (shared ? p.routes : 1);
  sum.size[0] = shared ? 1 : p.routes;
  for (int i = 0; i < 3; ++i) sum.size[i + 1] = sizes[i];
  sum.count = sum.size[0] * sizes[0] * sizes[1] * sizes[2];
  sum.partial = partial.data_ptr();
  sum.out = out;
  sum_partials(sum);
}

// The gradient of a parameter (dim, ...) or (route * dim, ...), with `columns` after dim.
void add_up_parameter(const Tensor& partial, const Tensor& out, const Problem& p, int64_t columns) {
  const bool shared = out.size(0) == p.dim;
  View<4> v;
  v.data = out.data_ptr();
  v.dtype = float_dtype("gradient", out);
  v.stride[0] = shared ? 0 : p.dim * out.stride(0);
  v.stride[2] = out.stride(0);
  v.stride[3] = out.dim() > 1 ? out.stride(1) : 0;
  add_up(partial, p, shared, {1, p.dim, columns}, v);
}

// The gradient of a narrow operand (batch, route or 1, row, step). In the partial sums steps come
// before rows if `steps_first`.
void add_up_narrow(const Tensor& partial, const Tensor& out, const Problem& p, bool steps_first) {
  View<4> v = view<4>("gradient", out);
  std::swap(v.stride[0], v.stride[1]);
  Sizes sizes{p.batch, out.size(2), p.steps};
  if (steps_first) {
    std::swap(v.stride[2], v.stride[3]);
    std::swap(sizes[1], sizes[2]);
  }
  add_up(partial, p, out.size(1) == 1, sizes, v);
}

using BwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor>;

BwdResult selective_scan_2d_bwd(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                                const Tensor& u, const Tensor& delta, const Tensor& A,
                                const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                const OptionalTensor& z, const OptionalTensor& delta_bias,
                                const OptionalTensor& dt_weight, const OptionalTensor& weights,
                                const OptionalTensor& initial_state, const Tensor& index,
                                const Tensor& chunk_states, int64_t reset_period, bool carry,
                                bool delta_softplus, bool merge, int64_t chunk) {
  const Operands x{u, delta, A, B, C, D, z, delta_bias, dt_weight, weights, initial_state, index};
  BwdParams p{};
  static_cast<Problem&>(p) = check(x, reset_period, carry, delta_softplus, merge, chunk);
  check_shape("chunk_states", chunk_states, "(batch, route, chunk, state, dim)",
              {p.batch, p.routes, p.chunks(), p.state, p.dim});
  if (dy) {
    check_shape("dy", *dy, "(batch, route or 1, dim, token)",
                {p.batch, merge ? 1 : p.routes, p.dim, p.tokens});
  }
  if (dlast_state) {
    check_shape("dlast_state", *dlast_state, "(batch, route, dim, state)",
                {p.batch, carry ? 1 : p.routes, p.dim, p.state});
  }
  p.chunk_states = chunk_states.data_ptr();
  p.dy = view<4>("dy", dy);
  p.dlast_state = view<4>("dlast_state", dlast_state);

  const ScalarType compute = scalar_type(p.compute);
  auto like = [&](const OptionalTensor& t) {
    return t ? empty(*t, sizes_of(*t), t->scalar_type()) : empty(u, {0}, compute);
  };
  Tensor du = empty_tokens(u, sizes_of(u), u.scalar_type());
  Tensor ddelta = p.delta_repeat == 1 ? like(delta)
                                      : empty(u, {p.batch, delta.size(1), p.dim, p.steps}, compute);
  Tensor dA = like(A), dB = like(B), dC = like(C), dD = like(D), ddelta_bias = like(delta_bias);
  Tensor dz = z ? empty_like(*z, z->scalar_type()) : like(z);
  Tensor ddt_weight = like(dt_weight), dweights = like(weights), dh0 = like(initial_state);
  if (delta_bias && p.delta_repeat > 1) {  // Python sums it over the channels of a row, like ddelta
    ddelta_bias = empty(u, {delta_bias->size(0) * p.delta_repeat}, compute);
  }
  p.du = view<4>("du", du);
  p.ddelta = view<4>("ddelta", ddelta);
  if (z) p.dz = view<3>("dz", dz);
  if (initial_state) p.dinitial_state = view<4>("dinitial_state", dh0);

  // Without a task (no batch, no channels) nothing writes the partial sums: the gradients are zero.
  const bool nothing = p.tasks() == 0;
  const int64_t groups = nothing ? 1 : p.row_groups(), parts = nothing ? 1 : p.channel_tasks();
  auto partial = [&](bool wanted, const Sizes& sizes) {
    if (!wanted) return empty(u, {0}, compute);
    return nothing ? zeros(u, sizes, compute) : empty(u, sizes, compute);
  };
  Tensor dA_parts = partial(true, {groups, p.routes, p.dim, p.state});
  Tensor dB_parts = partial(true, {parts, p.routes, p.batch, p.steps, p.state});
  Tensor dC_parts = partial(true, {parts, p.routes, p.batch, p.steps, p.state});
  Tensor ddt_parts = partial(p.rank > 0, {parts, p.routes, p.batch, p.rank, p.steps});
  Tensor ddt_weight_parts = partial(p.rank > 0, {groups, p.routes, p.dim, p.rank});
  Tensor dD_parts = partial(bool(D), {groups, p.routes, p.dim});
  Tensor dbias_parts = partial(bool(delta_bias), {groups, p.routes, p.dim});
  Tensor dweights_parts = partial(bool(weights), {groups, p.routes, p.dim});
  p.dA = dA_parts.data_ptr(), p.dB = dB_parts.data_ptr(), p.dC = dC_parts.data_ptr();
  p.ddt = ddt_parts.data_ptr(), p.ddt_weight = ddt_weight_parts.data_ptr();
  p.dD = dD_parts.data_ptr(), p.ddelta_bias = dbias_parts.data_ptr();
  p.dweights = dweights_parts.data_ptr();

  run_tasks([](const BwdParams& q, const Range& r) { bwd(q, r); }, p, p.tasks(), p.scratch_bytes());

  add_up_parameter(dA_parts, dA, p, p.state);
  add_up_narrow(dB_parts, dB, p, true);
  add_up_narrow(dC_parts, dC, p, true);
  if (D) add_up_parameter(dD_parts, dD, p, 1);
  if (delta_bias) add_up_parameter(dbias_parts, ddelta_bias, p, 1);
  if (p.rank > 0) {
    add_up_narrow(ddt_parts, ddelta, p, false);
    View<4> v;
    v.data = ddt_weight.data_ptr();
    v.dtype = float_dtype("gradient", ddt_weight);
    v.stride[0] = ddt_weight.stride(0);
    v.stride[2] = ddt_weight.stride(1), v.stride[3] = ddt_weight.stride(2);
    add_up(ddt_weight_parts, p, ddt_weight.size(0) == 1, {1, p.dim, p.rank}, v);
  }
  if (weights) {
    View<4> v;
    v.data = dweights.data_ptr();
    v.dtype = float_dtype("gradient", dweights);
    v.stride[0] = dweights.stride(0), v.stride[2] = dweights.stride(1);
    add_up(dweights_parts, p, false, {1, p.dim, 1}, v);
  }
  return {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, ddt_weight, dweights, dh0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("selective_scan_2d_fwd", TORCH_BOX(&selective_scan_2d_fwd));
  m.impl("selective_scan_2d_bwd", TORCH_BOX(&selective_scan_2d_bwd));
}

}  // namespace statescan::bindings
