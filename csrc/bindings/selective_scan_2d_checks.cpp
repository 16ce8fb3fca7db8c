#include "bindings/selective_scan_2d.h"

#include <algorithm>

namespace statescan::bindings {

using selective_scan_2d::kMaxTokens;
using selective_scan_2d::Problem;

namespace {

// Steps, routes and their tokens.
void check_index(const Tensor& index, Problem& p) {
  check_dim("routes", index, "(batch or 1, route, step)", 3);
  p.routes = index.size(1), p.steps = index.size(2);
  if (p.routes < 1) fail("routes must hold at least one route");
  if (index.size(0) != 1) {
    check_shape("routes", index, "(batch, route, step)", {p.batch, p.routes, p.steps});
  }
  p.index = index.data_ptr();
  for (int i = 0; i < 3; ++i) p.index_stride[i] = index.size(i) == 1 ? 0 : index.stride(i);
  p.index_is_wide = index.scalar_type() == ScalarType::Long;
  if (!p.index_is_wide && index.scalar_type() != ScalarType::Int) {
    fail("routes must be int32 or int64");
  }
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

void check_delta(const RoutedOperands& x, Problem& p) {
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

}  // namespace

Problem check_routed_scan(const RoutedOperands& x, int64_t reset_period, bool carry,
                          bool delta_softplus, bool merge, int64_t chunk) {
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
  check_same_device("routes", x.index, x.u);
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

void check_gradients(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                     const Tensor& chunk_states, const Problem& p) {
  check_shape("chunk_states", chunk_states, "(batch, route, chunk, state, dim)",
              {p.batch, p.routes, p.chunks(), p.state, p.dim});
  if (dy) {
    check_shape("dy", *dy, "(batch, route or 1, dim, token)",
                {p.batch, p.y_per_route ? p.routes : 1, p.dim, p.tokens});
  }
  if (dlast_state) {
    check_shape("dlast_state", *dlast_state, "(batch, route, dim, state)",
                {p.batch, p.carry ? 1 : p.routes, p.dim, p.state});
  }
}

Gradients empty_gradients(const RoutedOperands& x, const Problem& p) {
  const ScalarType compute = scalar_type(p.compute);
  auto like = [&](const OptionalTensor& t) {
    return t ? empty(*t, sizes_of(*t), t->scalar_type()) : empty(x.u, {0}, compute);
  };
  const bool grouped = p.delta_repeat > 1;
  const Sizes all_channels{p.batch, x.delta.size(1), p.dim, p.steps};
  return {empty_tokens(x.u, sizes_of(x.u), x.u.scalar_type()),
          p.delta_repeat == 1 ? like(x.delta) : empty(x.u, all_channels, compute),
          like(x.A),
          like(x.B),
          like(x.C),
          like(x.D),
          x.z ? empty_like(*x.z, x.z->scalar_type()) : like(x.z),
          grouped && x.delta_bias ? empty(x.u, {x.delta_bias->size(0) * p.delta_repeat}, compute)
                                  : like(x.delta_bias),
          like(x.dt_weight),
          like(x.weights),
          like(x.initial_state)};
}

namespace {

View<4> gradient_view(const Tensor& t, int64_t route, int64_t i, int64_t j, int64_t k) {
  return {t.data_ptr(), float_dtype("gradient", t), {route, i, j, k}};
}

// Partial sums of sizes (part, route, i, j, k): added up over the routes as well where they share what
// this is the gradient of. `out` has strides of (route, i, j, k).
void add_up_routes(const AddUp& add_up, const Tensor& partial, const Problem& p, bool shared,
                   const Sizes& sizes, const View<4>& out) {
  const int64_t size[4] = {shared ? 1 : p.routes, sizes[0], sizes[1], sizes[2]};
  add_up(partial, partial.size(0) * (shared ? p.routes : 1), size, out);
}

// The gradient of a parameter (dim, ...) or (route * dim, ...), with `columns` after dim.
void add_up_parameter(const AddUp& add_up, const Tensor& partial, const Tensor& out,
                      const Problem& p, int64_t columns) {
  const bool shared = out.size(0) == p.dim;
  const int64_t row = out.stride(0), column = out.dim() > 1 ? out.stride(1) : 0;
  add_up_routes(add_up, partial, p, shared, {1, p.dim, columns},
                gradient_view(out, shared ? 0 : p.dim * row, 0, row, column));
}

// The gradient of a narrow operand (batch, route or 1, row, step). In the partial sums steps come
// before rows if `steps_first`.
void add_up_narrow(const AddUp& add_up, const Tensor& partial, const Tensor& out, const Problem& p,
                   bool steps_first) {
  View<4> v = gradient_view(out, out.stride(1), out.stride(0), out.stride(2), out.stride(3));
  Sizes sizes{p.batch, out.size(2), p.steps};
  if (steps_first) {
    std::swap(v.stride[2], v.stride[3]);
    std::swap(sizes[1], sizes[2]);
  }
  add_up_routes(add_up, partial, p, out.size(1) == 1, sizes, v);
}

}  // namespace

void add_up_gradients(const PartialSums& sums, const RoutedOperands& x, const Problem& p,
                      const Gradients& g, const AddUp& add_up) {
  add_up_parameter(add_up, sums.A, g.A, p, p.state);
  add_up_narrow(add_up, sums.B, g.B, p, true);
  add_up_narrow(add_up, sums.C, g.C, p, true);
  if (x.D) add_up_parameter(add_up, sums.D, g.D, p, 1);
  if (x.delta_bias) add_up_parameter(add_up, sums.delta_bias, g.delta_bias, p, 1);
  if (p.rank > 0) {
    const Tensor& w = g.dt_weight;
    add_up_narrow(add_up, sums.dt, g.delta, p, false);
    add_up_routes(add_up, sums.dt_weight, p, w.size(0) == 1, {1, p.dim, p.rank},
                  gradient_view(w, w.stride(0), 0, w.stride(1), w.stride(2)));
  }
  if (x.weights) {
    const Tensor& w = g.weights;
    add_up_routes(add_up, sums.weights, p, false, {1, p.dim, 1},
                  gradient_view(w, w.stride(0), 0, w.stride(1), 0));
  }
}

Tensor empty_tokens(const Tensor& like, Sizes sizes, ScalarType dtype) {
  if (like.stride(2) >= like.stride(3)) return empty(like, sizes, dtype);
  std::swap(sizes[2], sizes[3]);
  return torch::stable::transpose(empty(like, sizes, dtype), 2, 3);
}

}  // namespace statescan::bindings
