#include <limits>

#include "bindings/ssd_scan.h"

namespace statescan::bindings {

using ssd_scan::Shape;

namespace {

// fail unless the decay comes from dt and A, or from log_decay, and not from both.
void check_decay(const SsdOperands& x, const Shape& p) {
  if (!x.log_decay) {
    if (!x.dt || !x.A) fail("give dt and A, or log_decay without them");
    check_shape("dt", *x.dt, "(batch, seqlen, head)", {p.batch, p.seqlen, p.heads});
    check_shape("A", *x.A, "(head)", {p.heads});
    if (x.dt_bias) check_shape("dt_bias", *x.dt_bias, "(head)", {p.heads});
    if (!(x.dt_min <= x.dt_max)) {
      fail("dt_limit must be (least, greatest), got (" + std::to_string(x.dt_min) + ", " +
           std::to_string(x.dt_max) + ")");
    }
    return;
  }
  if (x.dt || x.A || x.dt_bias || x.dt_softplus || p.dt_min != 0 ||
      p.dt_max != std::numeric_limits<double>::infinity()) {
    fail(
        "log_decay takes the place of dt and A: dt, A, dt_bias, dt_softplus and dt_limit must be "
        "left out");
  }
  check_shape("log_decay", *x.log_decay, "(batch, seqlen, head)", {p.batch, p.seqlen, p.heads});
}

}  // namespace

Shape check_ssd(const SsdOperands& x) {
  check_dim("x", x.x, "(batch, seqlen, head, headdim)", 4);
  check_dim("B", x.B, "(batch, seqlen, group, state)", 4);
  Shape p{};
  p.batch = x.x.size(0), p.seqlen = x.x.size(1), p.heads = x.x.size(2), p.headdim = x.x.size(3);
  p.groups = x.B.size(2), p.state = x.B.size(3), p.chunk = x.chunk;
  p.dt_softplus = x.dt_softplus, p.dt_min = x.dt_min, p.dt_max = x.dt_max;
  p.reverse = x.reverse, p.shift_output = x.shift_output, p.has_dt = x.dt.has_value();
  check_decay(x, p);
  if (p.groups < 1 || p.heads % p.groups != 0) {
    fail("B and C must have a number of groups that divides head = " + std::to_string(p.heads) +
         ", got " + std::to_string(p.groups));
  }
  if (p.state < 1) fail("B and C must have at least 1 state, got state = 0");
  const Sizes projection{p.batch, p.seqlen, p.groups, p.state};
  check_shape("B", x.B, "(batch, seqlen, group, state)", projection);
  check_shape("C", x.C, "(batch, seqlen, group, state)", projection);
  if (x.D && x.D->dim() == 2) {
    check_shape("D", *x.D, "(head, headdim)", {p.heads, p.headdim});
  } else if (x.D) {
    check_shape("D", *x.D, "(head)", {p.heads});
  }
  if (x.z) check_shape("z", *x.z, "(batch, seqlen, head, headdim)", sizes_of(x.x));
  if (p.chunk < 1) fail("chunk_size must be at least 1, got " + std::to_string(p.chunk));

  p.compute = compute_dtype({{"x", &x.x},
                             {"dt", pointer(x.dt)},
                             {"A", pointer(x.A)},
                             {"B", &x.B},
                             {"C", &x.C},
                             {"D", pointer(x.D)},
                             {"z", pointer(x.z)},
                             {"dt_bias", pointer(x.dt_bias)},
                             {"log_decay", pointer(x.log_decay)},
                             {"initial_states", pointer(x.initial_states)}});
  return p;
}

bool is_bfloat16(const SsdOperands& x, const Shape& p) {
  const auto is = [](const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; };
  return p.compute == DType::kFloat32 && is(x.x) && is(x.B) && is(x.C);
}

Sizes ssd_state_sizes(const Shape& p, int64_t slots, bool slots_by_id) {
  if (!slots_by_id) return {slots, p.heads, p.headdim, p.state};
  const int64_t sequences = p.batch == 0 ? 0 : slots / p.batch;
  return {p.batch, sequences, p.heads, p.headdim, p.state};
}

void check_initial_states(const SsdOperands& x, const Shape& p, int64_t slots, bool slots_by_id) {
  if (!x.initial_states) return;
  if (slots_by_id) {
    check_shape("initial_states", *x.initial_states, "(batch, sequence, head, headdim, state)",
                {p.batch, x.initial_states->size(1), p.heads, p.headdim, p.state});
  } else {
    check_shape("initial_states", *x.initial_states,
                x.cu_seqlens ? "(sequence, head, headdim, state)" : "(batch, head, headdim, state)",
                {slots, p.heads, p.headdim, p.state});
  }
}

void check_ssd_gradients(const SsdOperands& x, const Shape& p, const OptionalTensor& dy,
                         const OptionalTensor& dfinal_states, const OptionalTensor& dchunk_states,
                         const Tensor& cell_states, const Sizes& state_sizes) {
  check_shape("cell_states", cell_states, "(batch, cell, head, state, headdim)",
              {p.batch, p.cells(), p.heads, p.state, p.headdim});
  if (float_dtype("cell_states", cell_states) != p.cell_dtype()) {
    fail("cell_states must be of the dtype that the forward saved");
  }
  check_same_device("cell_states", cell_states, x.x);
  if (dy) {
    check_shape("dy", *dy, "(batch, seqlen, head, headdim)", sizes_of(x.x));
    check_same_device("dy", *dy, x.x);
  }
  if (dfinal_states) {
    check_shape("dfinal_states", *dfinal_states, "of final_states", state_sizes);
    check_same_device("dfinal_states", *dfinal_states, x.x);
  }
  if (dchunk_states) {
    check_shape("dchunk_states", *dchunk_states, "(batch, chunk, head, headdim, state)",
                {p.batch, p.chunks(), p.heads, p.headdim, p.state});
    check_same_device("dchunk_states", *dchunk_states, x.x);
  }
}

View<4> ssd_slot_view(const char* name, const Tensor& t) {
  View<4> v;
  v.data = t.data_ptr();
  v.dtype = float_dtype(name, t);
  const int64_t first = t.dim() - 4;
  for (int i = 0; i < 4; ++i) v.stride[i] = t.stride(first + i);
  return v;
}

}  // namespace statescan::bindings
