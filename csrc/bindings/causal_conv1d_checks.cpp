#include "bindings/causal_conv1d.h"

namespace statescan::bindings {

using namespace causal_conv1d;  // Mode, Shape

namespace {

Mode mode_of(const std::string& name, int64_t width) {
  if (name == "causal") return Mode::kCausal;
  if (name == "anticausal") return Mode::kAnticausal;
  if (name != "same") fail("mode must be causal, anticausal or same, got " + name);
  if (width % 2 == 0) {
    fail("mode same needs a centre: width must be odd, got " + std::to_string(width));
  }
  return Mode::kSame;
}

}  // namespace

void check_weight(const Tensor& weight, const OptionalTensor& bias, int64_t dim) {
  check_dim("weight", weight, "(dim, width)", 2);
  check_shape("weight", weight, "(dim, width)", {dim, weight.size(1)});
  if (weight.size(1) < 1) {
    fail("weight must have shape (dim, width) with width of at least 1, got width = 0");
  }
  if (bias) check_shape("bias", *bias, "(dim)", {dim});
}

Shape check(const Operands& o, bool silu, const std::string& mode) {
  check_dim("x", o.x, "(batch, dim, seqlen)", 3);
  Shape p{};
  p.batch = o.x.size(0), p.dim = o.x.size(1), p.seqlen = o.x.size(2);
  check_weight(o.weight, o.bias, p.dim);
  p.width = o.weight.size(1);
  p.mode = mode_of(mode, p.width);
  p.silu = silu;
  p.compute = compute_dtype({{"x", &o.x},
                             {"weight", &o.weight},
                             {"bias", pointer(o.bias)},
                             {"initial_state", pointer(o.initial_state)}});
  return p;
}

void check_no_state(const Shape& p, const OptionalTensor& initial_state, bool return_final_state) {
  if (p.mode != Mode::kSame) return;
  if (initial_state) fail("mode same has no initial_state: it sees both ends of the sequence");
  if (return_final_state) fail("mode same has no final state: it sees both ends of the sequence");
}

ScalarType state_dtype(const Tensor& x, const OptionalTensor& initial_state) {
  const ScalarType dtype = x.scalar_type();
  if (!initial_state || initial_state->scalar_type() == dtype) return dtype;
  const bool wide =
      dtype == ScalarType::Double || initial_state->scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

}  // namespace statescan::bindings
