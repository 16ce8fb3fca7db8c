#include "bindings/causal_conv1d.h"

namespace statescan::bindings {

using namespace causal_conv1d;  // Mode, Shape, UpdateShape

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

UpdateShape check(const UpdateOperands& o, bool silu) {
  if (o.x.dim() != 2) check_dim("x", o.x, "(batch, dim) or (batch, dim, tokens)", 3);
  UpdateShape p{};
  p.batch = o.x.size(0), p.dim = o.x.size(1), p.tokens = o.x.dim() == 3 ? o.x.size(2) : 1;
  check_weight(o.weight, o.bias, p.dim);
  p.width = o.weight.size(1);
  check_dim("conv_state", o.conv_state, "(slots, dim, state_len)", 3);
  p.slots = o.conv_state.size(0), p.state_len = o.conv_state.size(2);
  check_shape("conv_state", o.conv_state, "(slots, dim, state_len)",
              {o.conv_state_indices ? p.slots : p.batch, p.dim, p.state_len});
  if (p.state_len < p.width - 1) {
    fail("conv_state must have state_len of at least width - 1 = " + std::to_string(p.width - 1) +
         ", got " + std::to_string(p.state_len));
  }
  check_not_expanded("conv_state", o.conv_state);
  if (o.conv_state_indices) {
    check_shape("conv_state_indices", *o.conv_state_indices, "(batch)", {p.batch});
  }
  if (o.cache_seqlens) check_shape("cache_seqlens", *o.cache_seqlens, "(batch)", {p.batch});
  p.silu = silu;
  p.compute = compute_dtype({{"x", &o.x},
                             {"conv_state", &o.conv_state},
                             {"weight", &o.weight},
                             {"bias", pointer(o.bias)}});
  return p;
}

// x (batch, dim) as (batch, dim, 1).
View<3> token_view(const char* name, const Tensor& t) {
  View<3> v;
  v.data = t.data_ptr();
  v.dtype = float_dtype(name, t);
  v.stride[0] = t.stride(0), v.stride[1] = t.stride(1);
  v.stride[2] = t.dim() == 3 ? t.stride(2) : 0;
  return v;
}

void check_varlen_states(const Tensor& x, int64_t state_len) {
  check_dim("x", x, "(total, dim)", 2);
  if (state_len < 0) fail("state_len must be at least 0, got " + std::to_string(state_len));
}

}  // namespace statescan::bindings
