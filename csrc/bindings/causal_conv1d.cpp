#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "bindings/causal_conv1d.h"
#include "bindings/device.h"
#include "bindings/segments.h"
#include "bindings/tensor.h"
#include "causal_conv1d/kernels.h"
#include "common/sum_partials.h"

namespace statescan::bindings {
namespace {

using namespace causal_conv1d;  // FwdParams, BwdParams, ...

Sequences find_sequences(const Operands& o, const Problem& p) {
  const char* symbols = o.cu_seqlens ? "(sequence, dim, width - 1)" : "(batch, dim, width - 1)";
  if (o.initial_state) check_dim("initial_state", *o.initial_state, symbols, 3);
  Sequences found = sequences(p.batch, p.seqlen, o.seq_idx, o.cu_seqlens, o.initial_state, 3,
                              p.mode == Mode::kAnticausal);
  if (o.initial_state) {
    check_shape("initial_state", *o.initial_state, symbols, {found.slots, p.dim, p.width - 1});
  }
  return found;
}

// Taps and bias of every channel, as the kernels read them.
Tensor filter_of(const Operands& o, const Problem& p) {
  Tensor filter = empty(o.x, {p.width + 1, p.filter_pitch()}, scalar_type(p.compute));
  FilterParams f{};
  f.dim = p.dim, f.width = p.width, f.pitch = p.filter_pitch();
  f.mirror = p.mode == Mode::kAnticausal;
  f.compute = p.compute;
  f.weight = view<2>("weight", o.weight);
  f.bias = view<1>("bias", o.bias);
  f.filter = filter.data_ptr();
  prepare_filter(f, Range{0, 1, nullptr});
  return filter;
}

std::tuple<Tensor, Tensor> causal_conv1d_fwd(const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias,
                                             const OptionalTensor& initial_state,
                                             const OptionalTensor& seq_idx,
                                             const OptionalTensor& cu_seqlens, bool silu,
                                             std::string mode, std::optional<ScalarType> out_dtype,
                                             bool return_final_state) {
  const Operands o{x, weight, bias, initial_state, seq_idx, cu_seqlens};
  FwdParams p{};
  static_cast<Shape&>(p) = check(o, silu, mode);
  check_no_state(p, initial_state, return_final_state);
  const Sequences found = find_sequences(o, p);
  p.segments = &found.segments;

  Tensor y = empty_like(x, out_dtype ? *out_dtype : x.scalar_type());
  Tensor final_state =
      empty(x, return_final_state ? Sizes{found.slots, p.dim, p.width - 1} : Sizes{0},
            state_dtype(x, initial_state));
  p.x = view<3>("x", x);
  p.y = view<3>("out_dtype", y);
  p.initial_state = view<3>("initial_state", initial_state);
  if (return_final_state) p.final_state = view<3>("final_state", final_state);
  p.layout = layout_of(p, {&p.x, &p.y});
  p.plan();
  const std::vector<Piece> pieces = cut(p, p.piece_steps(), false);
  p.pieces = &pieces;
  const Tensor filter = filter_of(o, p);
  p.filter = filter.data_ptr();
  run_tasks([](const FwdParams& q, const Range& r) { fwd(q, r); }, p, p.tasks(), p.scratch_bytes(),
            p.grain());
  return {y, final_state};
}

// out[d, k] = sum over groups of partial[group, k, d], from tap `k0` on.
void add_up(const Tensor& partial, int64_t k0, int64_t taps, bool mirror, const BwdParams& p,
            const Tensor& out) {
  partials::SumParams s{};
  s.partial = static_cast<const char*>(partial.data_ptr()) + k0 * p.dim * element_bytes(p.compute);
  s.parts = partial.size(0), s.count = (p.width + 1) * p.dim;
  s.compute = p.compute;
  s.size[0] = s.size[1] = 1, s.size[2] = taps, s.size[3] = p.dim;
  s.out.data = out.data_ptr();
  s.out.dtype = float_dtype("gradient", out);
  s.out.stride[2] = out.dim() == 2 ? out.stride(1) : 0, s.out.stride[3] = out.stride(0);
  if (mirror) {  // the taps were mirrored for the kernel
    s.out.data =
        static_cast<char*>(s.out.data) + (taps - 1) * s.out.stride[2] * element_bytes(s.out.dtype);
    s.out.stride[2] = -s.out.stride[2];
  }
  sum_partials(s);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(
    const OptionalTensor& dy, const OptionalTensor& dfinal_state, const Tensor& x,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
    const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, bool silu, std::string mode) {
  const Operands o{x, weight, bias, initial_state, seq_idx, cu_seqlens};
  BwdParams p{};
  static_cast<Shape&>(p) = check(o, silu, mode);
  check_no_state(p, initial_state, dfinal_state.has_value());
  const Sequences found = find_sequences(o, p);
  p.segments = &found.segments;
  if (dy) check_shape("dy", *dy, "(batch, dim, seqlen)", {p.batch, p.dim, p.seqlen});
  if (dfinal_state) {
    check_shape("dfinal_state", *dfinal_state, "(sequence, dim, width - 1)",
                {found.slots, p.dim, p.width - 1});
  }

  Tensor dx = empty_like(x, x.scalar_type());
  Tensor dweight = empty_like(weight, weight.scalar_type());
  const ScalarType compute = scalar_type(p.compute);
  Tensor dbias = bias ? empty_like(*bias, bias->scalar_type()) : empty(x, {0}, compute);
  Tensor dinitial_state = initial_state ? empty_like(*initial_state, initial_state->scalar_type())
                                        : empty(x, {0}, compute);
  p.x = view<3>("x", x);
  p.dy = view<3>("dy", dy);
  p.dx = view<3>("dx", dx);
  p.initial_state = view<3>("initial_state", initial_state);
  p.dfinal_state = view<3>("dfinal_state", dfinal_state);
  if (initial_state) p.dinitial_state = view<3>("dinitial_state", dinitial_state);
  p.layout = layout_of(p, {&p.x, &p.dy, &p.dx});
  p.plan();
  const std::vector<Piece> pieces = cut(p, p.piece_steps(), true);
  p.pieces = &pieces;
  const Tensor filter = filter_of(o, p);
  p.filter = filter.data_ptr();
  const int64_t groups = p.groups();
  // Without a sequence nothing writes the partial sums, and the gradients are zero.
  const Sizes sizes{std::max<int64_t>(groups, 1), p.width + 1, p.dim};
  Tensor dfilter = groups == 0 ? zeros(x, sizes, compute) : empty(x, sizes, compute);
  p.dfilter = dfilter.data_ptr();
  run_tasks([](const BwdParams& q, const Range& r) { bwd(q, r); }, p, p.tasks(), p.scratch_bytes(),
            p.grain());
  add_up(dfilter, 0, p.width, p.mode == Mode::kAnticausal, p, dweight);
  if (bias) add_up(dfilter, p.width, 1, false, p, dbias);
  return {dx, dweight, dbias, dinitial_state};
}

// (batch) integers, checked.
std::vector<int64_t> per_element(const char* name, const OptionalTensor& t, int64_t batch) {
  if (!t) return {};
  check_cpu(name, *t);
  check_shape(name, *t, "(batch)", {batch});
  return integers(name, *t);
}

Tensor causal_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                            const OptionalTensor& bias, bool silu,
                            const OptionalTensor& cache_seqlens,
                            const OptionalTensor& conv_state_indices) {
  UpdateParams p{};
  static_cast<UpdateShape&>(p) =
      check(UpdateOperands{x, conv_state, weight, bias, cache_seqlens, conv_state_indices}, silu);
  std::vector<int64_t> slots;
  if (conv_state_indices) {
    slots = slot_indices("conv_state_indices", *conv_state_indices, p.batch, p.slots);
  }
  const std::vector<int64_t> positions = per_element("cache_seqlens", cache_seqlens, p.batch);

  Tensor y = empty_like(x, x.scalar_type());
  p.x = token_view("x", x);
  p.y = token_view("y", y);
  p.state = view<3>("conv_state", conv_state);
  p.weight = view<2>("weight", weight);
  p.bias = view<1>("bias", bias);
  p.slot_of = conv_state_indices ? slots.data() : nullptr;
  p.positions = cache_seqlens ? positions.data() : nullptr;
  run_tasks([](const UpdateParams& q, const Range& r) { update(q, r); }, p, p.tasks(),
            p.scratch_bytes(), p.grain());
  return y;
}

Tensor causal_conv1d_varlen_states(const Tensor& x, const Tensor& cu_seqlens, int64_t state_len) {
  check_varlen_states(x, state_len);
  const Sequences found = sequences(1, x.size(0), {}, cu_seqlens, {}, 3, false);
  VarlenStatesParams p{};
  p.dim = x.size(1), p.state_len = state_len;
  p.compute = compute_dtype({{"x", &x}});
  p.segments = &found.segments.segments;
  Tensor states = empty(x, {found.slots, p.dim, state_len}, x.scalar_type());
  p.x.data = x.data_ptr(), p.x.dtype = float_dtype("x", x);
  p.x.stride[1] = x.stride(1), p.x.stride[2] = x.stride(0);
  p.states = view<3>("states", states);
  run_tasks([](const VarlenStatesParams& q, const Range& r) { varlen_states(q, r); }, p, p.tasks(),
            p.scratch_bytes(), 16);
  return states;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd));
  m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
  m.impl("causal_conv1d_varlen_states", TORCH_BOX(&causal_conv1d_varlen_states));
}

}  // namespace statescan::bindings
