#include "bindings/routes.h"

#include <algorithm>
#include <limits>

#include "bindings/device.h"
#include "cross_scan/kernels.h"
#include "route_gather/kernels.h"

namespace statescan::bindings {
namespace {

using cross_scan::DigitRoute;
using cross_scan::LineRoute;

template <class T>
std::vector<int32_t> read_table(const Tensor& t, int64_t length) {
  const Sizes sizes = sizes_of(t);
  const auto strides = t.strides();
  const bool batched = sizes.size() == 3;
  const int64_t batch = batched ? sizes[0] : 1, batch_stride = batched ? strides[0] : 0;
  const int64_t rows = sizes[batched], columns = sizes[batched + 1];
  const int64_t row_stride = strides[batched], column_stride = strides[batched + 1];
  std::vector<int32_t> out(batch * rows * columns);
  int64_t low = 0, high = -1, at = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = static_cast<const T*>(t.data_ptr()) + b * batch_stride + i * row_stride;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t token = row[j * column_stride];
        low = std::min(low, token), high = std::max(high, token);
        out[at++] = int32_t(token);
      }
    }
  }
  check_tokens("index", low, high, length);
  return out;
}

// In lines, if every route is.
std::vector<LineRoute> in_lines(const RouteSet& routes, int64_t length) {
  std::vector<LineRoute> lines;
  for (const DigitRoute& route : routes.digits) {
    auto found = cross_scan::in_lines(route, length);
    if (!found) return {};
    lines.push_back(std::move(*found));
  }
  return lines;
}

void need_table(RouteSet& routes) {
  if (routes.digits.empty()) return;
  routes.index.reserve(routes.count * routes.steps);
  for (const DigitRoute& route : routes.digits) cross_scan::append_index(route, routes.index);
}

// One over the number of visits of every token, (batch or 1, length).
std::vector<float> one_over_visits(const RouteSet& routes, int64_t batch, int64_t length) {
  const int64_t tables = routes.index_stride == 0 ? 1 : batch;
  const int64_t per_table = routes.count * routes.steps;
  std::vector<float> scale(tables * length);
  for (int64_t b = 0; b < tables; ++b) {
    for (int64_t i = 0; i < per_table; ++i) {
      const int32_t token = routes.index[b * per_table + i];
      if (token >= 0) scale[b * length + token] += 1;
    }
  }
  for (float& x : scale) x = 1 / std::max(x, 1.0f);
  return scale;
}

// Results of at least so many bytes are stored past the caches: the last-level caches of today would
// not keep them for who reads them next.
bool streams(const Tensor& out) {
  return out.numel() * element_bytes(float_dtype("y", out)) >= int64_t(16) << 20;
}

// Where the visits of every row of the result begin, and the visits in the order of the table.
struct Visits {
  std::vector<int32_t> first, visits;
};

Visits visits_of(const RouteSet& routes, int64_t batch, int64_t length, bool sum) {
  const int64_t tables = routes.index_stride == 0 ? 1 : batch;
  const int64_t per_table = routes.count * routes.steps;
  const int64_t rows = sum ? length : length * routes.count;
  const auto row_of = [&](int64_t i, int32_t token) {
    return sum ? int64_t(token) : token * routes.count + i / routes.steps;
  };
  Visits out;
  out.first.assign(tables * (rows + 1), 0);
  out.visits.resize(tables * per_table);
  for (int64_t b = 0; b < tables; ++b) {
    const int32_t* index = routes.index.data() + b * per_table;
    int32_t* first = out.first.data() + b * (rows + 1);
    for (int64_t i = 0; i < per_table; ++i) {
      if (index[i] >= 0) ++first[row_of(i, index[i]) + 1];
    }
    for (int64_t row = 0; row < rows; ++row) first[row + 1] += first[row];
    std::vector<int32_t> next(first, first + rows);
    for (int64_t i = 0; i < per_table; ++i) {
      if (index[i] >= 0) out.visits[b * per_table + next[row_of(i, index[i])]++] = int32_t(i);
    }
  }
  return out;
}

template <class Params>
void fill_rows(Params& p, const RouteSet& routes, int64_t batch, int64_t dim, int64_t length) {
  p.batch = batch, p.count = routes.count, p.dim = dim;
  p.length = length, p.steps = routes.steps;
  p.index = routes.index.data();
  p.index_stride = routes.index_stride;
}

// Visits are counted in 32 bits.
bool few(const RouteSet& routes) {
  return routes.count * routes.steps <= std::numeric_limits<int32_t>::max();
}

// Rows of at least so many channels are moved as they are; narrower ones by blocks of tokens.
constexpr int64_t kLeastRow = 8;

route_gather::Problem problem_of(const RouteSet& routes, int64_t batch, int64_t dim,
                                 int64_t length) {
  route_gather::Problem p{};
  p.batch = batch, p.count = routes.count, p.dim = dim;
  p.length = length, p.steps = routes.steps;
  p.index = routes.index.data();
  p.index_stride = routes.index_stride;
  return p;
}

}  // namespace

RouteSet route_set(const OptionalTensor& index, const std::vector<int64_t>& digits, int64_t batch,
                   int64_t length) {
  if (!digits.empty()) return digit_routes(digits, length);
  check_length(length);
  RouteSet out = table_routes(index, batch);
  check_cpu("index", *index);
  const bool wide = index->scalar_type() == ScalarType::Long;
  out.index = wide ? read_table<int64_t>(*index, length) : read_table<int32_t>(*index, length);
  return out;
}

Tensor gather(const Tensor& tokens, RouteSet routes, bool channel_last) {
  check_cpu("x", tokens);
  const Sizes sizes = sizes_of(tokens);
  const int64_t batch = sizes[0], dim = sizes[2], length = sizes[3];
  const View<4> from = tokens_view(tokens, routes);
  Tensor stack = empty(tokens, stack_sizes(batch, routes.count, dim, routes.steps, channel_last),
                       tokens.scalar_type());
  if (stack.numel() == 0) return stack;
  const std::vector<LineRoute> lines = in_lines(routes, length);
  if (!lines.empty() && from.stride[3] == 1 && !channel_last) {
    const cross_scan::ScanParams p{
        batch, dim, length, streams(stack), &lines, from, stack_view("y", stack, channel_last)};
    run_tasks([](const cross_scan::ScanParams& q, const Range& r) { cross_scan::scan(q, r); }, p,
              p.tasks(), p.scratch_bytes(), p.grain());
    return stack;
  }
  need_table(routes);
  if (channel_last && from.stride[2] == 1 && dim >= kLeastRow) {
    route_gather::GatherRowsParams p{};
    fill_rows(p, routes, batch, dim, length);
    p.stream = streams(stack);
    p.tokens = from;
    p.stack = stack_view("y", stack, channel_last);
    run_tasks([](const auto& q, const Range& r) { route_gather::gather_rows(q, r); }, p, p.tasks(),
              p.scratch_bytes());
    return stack;
  }
  route_gather::GatherParams p{problem_of(routes, batch, dim, length), streams(stack)};
  p.tokens = from;
  p.stack = stack_view("y", stack, channel_last);
  run_tasks([](const route_gather::GatherParams& q, const Range& r) { route_gather::gather(q, r); },
            p, p.tasks(), p.scratch_bytes(), p.grain());
  return stack;
}

Tensor scatter(const Tensor& stack, RouteSet routes, int64_t length, Reduce reduce,
               bool channel_last, std::optional<ScalarType> out_dtype) {
  check_cpu("y", stack);
  const Sizes sizes = sizes_of(stack);
  const int64_t batch = sizes[0], dim = sizes[2];
  const Merged merged = merged_tokens(stack, routes, length, reduce, channel_last, out_dtype);
  const Tensor& out = merged.tensor;
  if (stack.numel() == 0) return out;
  const bool sum = reduce != Reduce::kNone;
  const View<4> to = merged.view;
  const DType compute = merged.compute;
  const View<4> from = view<4>("y", stack);
  const std::vector<LineRoute> lines = in_lines(routes, length);
  const auto grid = lines.empty() ? std::nullopt : cross_scan::on_grid(lines);
  if (grid && from.stride[3] == 1 && !channel_last && reduce != Reduce::kMean) {
    const cross_scan::MergeParams p{batch,   dim,    length, sum, streams(out),
                                    compute, &*grid, from,   to};
    run_tasks([](const cross_scan::MergeParams& q, const Range& r) { cross_scan::merge(q, r); }, p,
              p.tasks(), p.scratch_bytes(), p.grain());
    return out;
  }
  need_table(routes);
  route_gather::ScatterParams p{problem_of(routes, batch, dim, length), compute, sum, nullptr, 0};
  std::vector<float> scale;
  if (reduce == Reduce::kMean) {
    scale = one_over_visits(routes, batch, length);
    p.scale = scale.data();
    p.scale_stride = routes.index_stride == 0 ? 0 : length;
  }
  if (channel_last && from.stride[2] == 1 && dim >= kLeastRow && few(routes)) {
    const Visits visits = visits_of(routes, batch, length, sum);
    route_gather::ScatterRowsParams q{};
    fill_rows(q, routes, batch, dim, length);
    q.stream = streams(out);
    q.compute = compute;
    q.tokens = to, q.stack = from;
    q.sum = sum;
    q.first = visits.first.data(), q.visits = visits.visits.data();
    q.scale = p.scale, q.scale_stride = p.scale_stride;
    run_tasks([](const auto& r, const Range& range) { route_gather::scatter_rows(r, range); }, q,
              q.tasks(), q.scratch_bytes());
    return out;
  }
  p.stack = from;
  p.tokens = to;
  run_tasks(
      [](const route_gather::ScatterParams& q, const Range& r) { route_gather::scatter(q, r); }, p,
      p.tasks(), p.scratch_bytes(), p.grain());
  return out;
}

}  // namespace statescan::bindings
