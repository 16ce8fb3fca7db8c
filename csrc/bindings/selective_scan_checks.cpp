#include "bindings/selective_scan.h"

namespace statescan::bindings {

using selective_scan::Shape;

namespace {

// fail unless B (or C) is (batch, group, state, seqlen), (batch, state, seqlen) or (dim, state).
void check_projection(const char* name, const Tensor& x, const Shape& p) {
  if (x.dim() == 4) {
    check_shape(name, x, "(batch, group, state, seqlen)", {p.batch, p.groups, p.state, p.seqlen});
  } else if (x.dim() == 3) {
    check_shape(name, x, "(batch, state, seqlen)", {p.batch, p.state, p.seqlen});
  } else if (x.dim() == 2) {
    check_shape(name, x, "(dim, state)", {p.dim, p.state});
  } else {
    fail(std::string(name) + " must have shape (batch, group, state, seqlen), " +
         "(batch, state, seqlen) or (dim, state), got " + to_string(sizes_of(x)));
  }
}

int64_t groups_of(const ScanOperands& x) {
  for (const Tensor* t : {&x.B, &x.C}) {
    if (t->dim() == 4) return t->size(1);
  }
  return 1;
}

}  // namespace

View<4> projection_view(const char* name, const Tensor& x) {
  const auto s = x.strides();
  View<4> v;
  v.data = x.data_ptr();
  v.dtype = float_dtype(name, x);
  const int64_t strides[3][4] = {{0, s[0], s[1], 0},
                                 {s[0], 0, x.dim() > 2 ? s[1] : 0, x.dim() > 2 ? s[2] : 0},
                                 {s[0], s[1], x.dim() > 3 ? s[2] : 0, x.dim() > 3 ? s[3] : 0}};
  for (int i = 0; i < 4; ++i) v.stride[i] = strides[x.dim() - 2][i];
  return v;
}

Shape check_scan(const ScanOperands& x, bool delta_softplus, bool reverse, int64_t chunk) {
  check_dim("u", x.u, "(batch, dim, seqlen)", 3);
  check_dim("A", x.A, "(dim, state)", 2);
  Shape p{};
  p.batch = x.u.size(0), p.dim = x.u.size(1), p.seqlen = x.u.size(2);
  p.state = x.A.size(1), p.groups = groups_of(x);
  p.chunk = chunk, p.delta_softplus = delta_softplus, p.reverse = reverse;
  p.constant_B = x.B.dim() == 2, p.constant_C = x.C.dim() == 2;

  check_dim("delta", x.delta, "(batch, dim, seqlen)", 3);
  const int64_t delta_dim = x.delta.size(1);
  if (delta_dim < 1 ? p.dim != delta_dim : p.dim % delta_dim != 0) {
    fail("delta must have a number of rows that divides dim = " + std::to_string(p.dim) + ", got " +
         std::to_string(delta_dim));
  }
  check_shape("delta", x.delta, "(batch, delta_dim, seqlen)", {p.batch, delta_dim, p.seqlen});
  p.delta_repeat = delta_dim < 1 ? 1 : p.dim / delta_dim;
  check_shape("A", x.A, "(dim, state)", {p.dim, p.state});
  if (p.state < 1) fail("A must have shape (dim, state) with state of at least 1, got state = 0");
  if (p.groups < 1 || p.dim % p.groups != 0) {
    fail("B and C must have a number of groups that divides dim = " + std::to_string(p.dim) +
         ", got " + std::to_string(p.groups));
  }
  check_projection("B", x.B, p);
  check_projection("C", x.C, p);
  if (x.D) check_shape("D", *x.D, "(dim)", {p.dim});
  if (x.z) check_shape("z", *x.z, "(batch, dim, seqlen)", {p.batch, p.dim, p.seqlen});
  if (x.delta_bias) check_shape("delta_bias", *x.delta_bias, "(delta_dim)", {delta_dim});
  if (chunk < 1) fail("chunk must be at least 1, got " + std::to_string(chunk));

  p.compute = compute_dtype({{"u", &x.u},
                             {"delta", &x.delta},
                             {"A", &x.A},
                             {"B", &x.B},
                             {"C", &x.C},
                             {"D", pointer(x.D)},
                             {"z", pointer(x.z)},
                             {"delta_bias", pointer(x.delta_bias)},
                             {"initial_state", pointer(x.initial_state)}});
  return p;
}

}  // namespace statescan::bindings
