#include "bindings/routes.h"

#include <limits>

namespace statescan::bindings {

using cross_scan::Digit;
using cross_scan::DigitRoute;

namespace {

// The lowest and highest token of a route that has steps.
std::pair<int64_t, int64_t> extent(const DigitRoute& route) {
  int64_t low = route.base, high = route.base;
  for (const Digit& digit : route.digits) {
    (digit.stride < 0 ? low : high) += (digit.n - 1) * digit.stride;
  }
  return {low, high};
}

std::vector<DigitRoute> parse(const std::vector<int64_t>& flat) {
  std::vector<DigitRoute> routes;
  size_t at = 0;
  const auto next = [&] {
    if (at == flat.size()) fail("digits end in the middle of a route");
    return flat[at++];
  };
  while (at < flat.size()) {
    DigitRoute route;
    route.base = next();
    route.rev = next() != 0;
    for (int64_t count = next(); count > 0; --count) {
      const int64_t n = next(), stride = next(), flip = next(), snake = next();
      if (n < 0) fail("a digit must have a size of at least 0, got " + std::to_string(n));
      route.digits.push_back({n, stride, flip != 0, snake != 0});
    }
    routes.push_back(std::move(route));
  }
  return routes;
}

RouteSet from_digits(std::vector<DigitRoute> digits, int64_t length) {
  RouteSet out;
  out.count = int64_t(digits.size());
  out.steps = digits.front().steps();
  for (const DigitRoute& route : digits) {
    if (route.steps() != out.steps) fail("routes must have the same number of steps");
    const auto [low, high] = extent(route);
    if (out.steps > 0 && low < 0) check_tokens("digits", -3, high, length);
    if (out.steps > 0) check_tokens("digits", low, high, length);
  }
  out.digits = std::move(digits);
  return out;
}

}  // namespace

void check_length(int64_t length) {
  if (length < 0) fail("length must be at least 0, got " + std::to_string(length));
  if (length > std::numeric_limits<int32_t>::max()) {
    fail("routes address at most 2^31 - 1 tokens, got " + std::to_string(length));
  }
}

void check_tokens(const char* name, int64_t low, int64_t high, int64_t length) {
  if (low >= -2 && high < length) return;
  fail(std::string(name) + " must be -2, -1 or a token in 0 .. " + std::to_string(length - 1) +
       ", got values from " + std::to_string(low) + " to " + std::to_string(high));
}

RouteSet cross_routes(const std::string& mode, int64_t H, int64_t W) {
  if (H < 0 || W < 0) {
    fail("H and W must be at least 0, got " + std::to_string(H) + " and " + std::to_string(W));
  }
  check_length(H * W);
  const DigitRoute rows{{{H, W, false, false}, {W, 1, false, false}}};
  const DigitRoute columns{{{W, 1, false, false}, {H, W, false, false}}};
  const DigitRoute from_right{{{W, 1, true, false}, {H, W, false, false}}};
  const DigitRoute from_below{{{W, 1, false, false}, {H, W, true, false}}};
  const DigitRoute rows_back{rows.digits, 0, true}, columns_back{columns.digits, 0, true};
  if (mode == "cross2d") return from_digits({rows, columns, rows_back, columns_back}, H * W);
  if (mode == "unidi") return from_digits({rows, rows, rows, rows}, H * W);
  if (mode == "bidi") return from_digits({rows, rows, rows_back, rows_back}, H * W);
  if (mode == "bidi2") return from_digits({rows, rows_back}, H * W);
  if (mode == "rot90") return from_digits({rows, from_right, rows_back, from_below}, H * W);
  fail("mode must be cross2d, unidi, bidi, bidi2 or rot90, got " + mode);
}

RouteSet digit_routes(const std::vector<int64_t>& digits, int64_t length) {
  check_length(length);
  return from_digits(parse(digits), length);
}

RouteSet table_routes(const OptionalTensor& index, int64_t batch) {
  if (!index) fail("give routes by digits or by index");
  const Sizes sizes = sizes_of(*index);
  if (sizes.size() != 2 && sizes.size() != 3) {
    fail("index must have shape (count, steps) or (batch, count, steps), got " + to_string(sizes));
  }
  RouteSet out;
  out.count = sizes[sizes.size() - 2], out.steps = sizes.back();
  if (sizes.size() == 3) {
    check_shape("index", *index, "(batch, count, steps)", {batch, out.count, out.steps});
    out.index_stride = out.count * out.steps;
  }
  const ScalarType dtype = index->scalar_type();
  if (dtype != ScalarType::Int && dtype != ScalarType::Long) fail("index must be int32 or int64");
  return out;
}

Reduce reduce_of(const std::string& name) {
  if (name == "sum") return Reduce::kSum;
  if (name == "none") return Reduce::kNone;
  if (name == "mean") return Reduce::kMean;
  fail("reduce must be sum, none or mean, got " + name);
}

Sizes stack_sizes(int64_t batch, int64_t count, int64_t dim, int64_t steps, bool channel_last) {
  return channel_last ? Sizes{batch, steps, count, dim} : Sizes{batch, count, dim, steps};
}

// A contiguous tensor of `stack_sizes` as (batch, count, dim, steps).
View<4> stack_view(const char* name, const Tensor& t, bool channel_last) {
  View<4> v = view<4>(name, t);
  if (channel_last) {
    const auto s = t.strides();
    v.stride[0] = s[0], v.stride[1] = s[2], v.stride[2] = s[3], v.stride[3] = s[1];
  }
  return v;
}

View<4> tokens_view(const Tensor& tokens, const RouteSet& routes) {
  const Sizes sizes = sizes_of(tokens);
  View<4> v = view<4>("x", tokens);
  if (sizes[1] == 1) {
    v.stride[1] = 0;
  } else {
    check_shape("x", tokens, "(batch, count, dim, length)",
                {sizes[0], routes.count, sizes[2], sizes[3]});
  }
  return v;
}

Merged merged_tokens(const Tensor& stack, const RouteSet& routes, int64_t length, Reduce reduce,
                     bool channel_last, std::optional<ScalarType> out_dtype) {
  const Sizes sizes = sizes_of(stack);
  const int64_t batch = sizes[0], dim = sizes[2];
  check_shape("y", stack, "(batch, count, dim, steps)", {batch, routes.count, dim, routes.steps});
  const ScalarType dtype = out_dtype ? *out_dtype : stack.scalar_type();
  const bool sum = reduce != Reduce::kNone;
  const Sizes merged = channel_last ? Sizes{batch, length, dim} : Sizes{batch, dim, length};
  const Sizes shape = sum ? merged : stack_sizes(batch, routes.count, dim, length, channel_last);
  Tensor tensor = stack.numel() == 0 ? zeros(stack, shape, dtype) : empty(stack, shape, dtype);
  const DType compute = compute_dtype({{"y", &stack}, {"out_dtype", &tensor}});
  if (!sum) return {tensor, stack_view("out_dtype", tensor, channel_last), compute};
  const View<3> v = view<3>("out_dtype", tensor);
  View<4> tokens{v.data, v.dtype, {v.stride[0], 0, v.stride[1], v.stride[2]}};
  if (channel_last) std::swap(tokens.stride[2], tokens.stride[3]);
  return {tensor, tokens, compute};
}

}  // namespace statescan::bindings
