#include <torch/csrc/stable/library.h>

#include "bindings/routes.h"

namespace statescan::bindings {
namespace {

Tensor route_gather(const Tensor& x, const OptionalTensor& index, std::vector<int64_t> digits,
                    bool channel_last) {
  check_dim("x", x, "(batch, count or 1, dim, length)", 4);
  return gather(x, route_set(index, digits, x.size(0), x.size(3)), channel_last);
}

Tensor route_scatter(const Tensor& y, const OptionalTensor& index, std::vector<int64_t> digits,
                     int64_t length, std::string reduce, bool channel_last,
                     std::optional<ScalarType> out_dtype) {
  check_dim("y", y, "(batch, count, dim, steps)", 4);
  return scatter(y, route_set(index, digits, y.size(0), length), length, reduce_of(reduce),
                 channel_last, out_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("route_gather", TORCH_BOX(&route_gather));
  m.impl("route_scatter", TORCH_BOX(&route_scatter));
}

}  // namespace statescan::bindings
