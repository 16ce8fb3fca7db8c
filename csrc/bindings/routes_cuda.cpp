// cross_scan, cross_merge, route_gather and route_scatter on CUDA: all of them one gather and one
// scatter, along routes that a first kernel writes out as a table on the device.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "bindings/routes.h"
#include "bindings/stream.h"
#include "cross_scan/cuda.h"
#include "route_gather/cuda.h"

namespace statescan::bindings {
namespace {

using namespace route_gather;  // cuda::GatherParams, ...

// Routes and what the device has of them. Only the sizes of a given table are known on the host.
struct DeviceRoutes {
  RouteSet set;
  OptionalTensor index;  // if there are no digits

  cuda::Routes sizes(int64_t length) const {
    return {set.count, set.steps, length, set.index_stride != 0};
  }
};

DeviceRoutes device_routes(const Tensor& like, const OptionalTensor& index,
                           const std::vector<int64_t>& digits, int64_t length) {
  if (!digits.empty()) return {digit_routes(digits, length), std::nullopt};
  check_length(length);
  DeviceRoutes routes{table_routes(index, like.size(0)), index};
  check_same_device("index", *index, like);
  return routes;
}

void check_steps(const DeviceRoutes& routes) {
  if (routes.set.steps > std::numeric_limits<int32_t>::max()) {
    fail("routes have at most 2^31 - 1 steps on a GPU, got " + std::to_string(routes.set.steps));
  }
}

Tensor entries(const Tensor& like, const cuda::Routes& routes, int64_t batch, int64_t each) {
  return empty(like, {routes.tables(batch), routes.count, each}, ScalarType::Int);
}

// Fills the table, in memory that `kept` holds.
cuda::Table table_of(const Tensor& like, const DeviceRoutes& routes, int64_t length,
                     OptionalTensor& kept, cudaStream_t stream) {
  const int64_t batch = like.size(0);
  cuda::Table table{routes.sizes(length)};
  kept = entries(like, table, batch, table.steps);
  table.token = static_cast<int32_t*>(kept->data_ptr());
  if (!routes.index) {
    expand(routes.set.digits, table, stream);
    return table;
  }
  const Tensor& index = *routes.index;
  cuda::GivenTable given{index.data_ptr(), index.scalar_type() == ScalarType::Long, {}};
  for (int64_t i = 1; i <= index.dim(); ++i) given.stride[3 - i] = index.stride(index.dim() - i);
  read_table(given, table, batch, stream);
  return table;
}

bool visit_once(const DeviceRoutes& routes) {
  if (routes.index) return false;  // who knows
  for (const cross_scan::DigitRoute& route : routes.set.digits) {
    if (!visits_once(route)) return false;
  }
  return true;
}

// Routes along the rows and columns of a large map, between channel-first tensors, go by tiles.
std::optional<cross_scan::cuda::MapRoutes> by_tiles(const DeviceRoutes& routes, int64_t length,
                                                    const View<4>& tokens, const View<4>& stack) {
  const bool double_type = tokens.dtype == DType::kFloat64 || stack.dtype == DType::kFloat64;
  if (routes.index || double_type || tokens.stride[3] != 1 || stack.stride[3] != 1) return {};
  return cross_scan::cuda::over_map(routes.set.digits, length);
}

Tensor gather(const Tensor& tokens, const DeviceRoutes& routes, bool channel_last) {
  check_steps(routes);
  const int64_t batch = tokens.size(0), dim = tokens.size(2), length = tokens.size(3);
  cuda::GatherParams p{batch, dim, {}, tokens_view(tokens, routes.set), {}};
  const OnDevice device(tokens);
  const Sizes sizes = stack_sizes(batch, routes.set.count, dim, routes.set.steps, channel_last);
  if (length == 0) return zeros(tokens, sizes, tokens.scalar_type());
  Tensor stack = empty(tokens, sizes, tokens.scalar_type());
  if (stack.numel() == 0) return stack;
  p.stack = stack_view("y", stack, channel_last);
  if (const auto map = by_tiles(routes, length, p.tokens, p.stack)) {
    cross_scan::cuda::scan({batch, dim, *map, p.tokens, p.stack}, device.stream);
    return stack;
  }
  OptionalTensor kept;
  p.table = table_of(tokens, routes, length, kept, device.stream);
  cuda::gather(p, device.stream);
  return stack;
}

Tensor scatter(const Tensor& stack, const DeviceRoutes& routes, int64_t length, Reduce reduce,
               bool channel_last, std::optional<ScalarType> out_dtype) {
  check_steps(routes);
  const OnDevice device(stack);
  const Merged merged = merged_tokens(stack, routes.set, length, reduce, channel_last, out_dtype);
  if (stack.numel() == 0 || merged.tensor.numel() == 0) return merged.tensor;
  const int64_t batch = stack.size(0);
  cuda::ScatterParams p{};
  p.batch = batch, p.dim = stack.size(2);
  p.compute = merged.compute;
  p.sum = reduce != Reduce::kNone, p.mean = reduce == Reduce::kMean;
  p.stack = view<4>("y", stack), p.tokens = merged.view;
  if (const auto map = by_tiles(routes, length, p.tokens, p.stack)) {
    cross_scan::cuda::merge({batch, p.dim, *map, p.sum, p.mean, p.stack, p.tokens}, device.stream);
    return merged.tensor;
  }
  p.visits = cuda::Visits{routes.sizes(length)};
  const Tensor first = entries(stack, p.visits, batch, length);
  p.visits.first = static_cast<int32_t*>(first.data_ptr());
  OptionalTensor token, next;
  if (visit_once(routes)) {
    invert(routes.set.digits, p.visits, device.stream);
  } else {
    const cuda::Table table = table_of(stack, routes, length, token, device.stream);
    next = entries(stack, p.visits, batch, p.visits.steps);
    p.visits.next = static_cast<int32_t*>(next->data_ptr());
    invert(table, p.visits, batch, device.stream);
  }
  cuda::scatter(p, device.stream);
  return merged.tensor;
}

Tensor cross_scan(const Tensor& x, int64_t H, int64_t W, std::string mode, bool channel_last) {
  check_dim("x", x, "(batch, count or 1, dim, H * W)", 4);
  check_shape("x", x, "(batch, count or 1, dim, H * W)", {x.size(0), x.size(1), x.size(2), H * W});
  return gather(x, {cross_routes(mode, H, W), std::nullopt}, channel_last);
}

Tensor cross_merge(const Tensor& y, int64_t H, int64_t W, std::string mode, std::string reduce,
                   bool channel_last, std::optional<ScalarType> out_dtype) {
  check_dim("y", y, "(batch, count, dim, H * W)", 4);
  return scatter(y, {cross_routes(mode, H, W), std::nullopt}, H * W, reduce_of(reduce),
                 channel_last, out_dtype);
}

Tensor route_gather(const Tensor& x, const OptionalTensor& index, std::vector<int64_t> digits,
                    bool channel_last) {
  check_dim("x", x, "(batch, count or 1, dim, length)", 4);
  return gather(x, device_routes(x, index, digits, x.size(3)), channel_last);
}

Tensor route_scatter(const Tensor& y, const OptionalTensor& index, std::vector<int64_t> digits,
                     int64_t length, std::string reduce, bool channel_last,
                     std::optional<ScalarType> out_dtype) {
  check_dim("y", y, "(batch, count, dim, steps)", 4);
  return scatter(y, device_routes(y, index, digits, length), length, reduce_of(reduce),
                 channel_last, out_dtype);
}

}  // namespace

STATESCAN_CUDA_IMPL(m) {
  m.impl("cross_scan", TORCH_BOX(&cross_scan));
  m.impl("cross_merge", TORCH_BOX(&cross_merge));
  m.impl("route_gather", TORCH_BOX(&route_gather));
  m.impl("route_scatter", TORCH_BOX(&route_scatter));
}

}  // namespace statescan::bindings
