#include <torch/csrc/stable/library.h>

#include "bindings/routes.h"

namespace statescan::bindings {
namespace {

Tensor cross_scan(const Tensor& x, int64_t H, int64_t W, std::string mode, bool channel_last) {
  check_dim("x", x, "(batch, count or 1, dim, H * W)", 4);
  check_shape("x", x, "(batch, count or 1, dim, H * W)", {x.size(0), x.size(1), x.size(2), H * W});
  return gather(x, cross_routes(mode, H, W), channel_last);
}

Tensor cross_merge(const Tensor& y, int64_t H, int64_t W, std::string mode, std::string reduce,
                   bool channel_last, std::optional<ScalarType> out_dtype) {
  check_dim("y", y, "(batch, count, dim, H * W)", 4);
  return scatter(y, cross_routes(mode, H, W), H * W, reduce_of(reduce), channel_last, out_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("cross_scan", TORCH_BOX(&cross_scan));
  m.impl("cross_merge", TORCH_BOX(&cross_merge));
}

}  // namespace statescan::bindings
