#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/causal_conv1d.h"
#include "bindings/runs.h"
#include "bindings/stream.h"
#include "causal_conv1d/cuda.h"

namespace statescan::bindings {
namespace {

using namespace causal_conv1d;  // Shape, cuda::FwdParams, ...

// `with_final_state`: it, or its gradient, takes part.
DeviceSequences find_sequences(const Operands& o, const Shape& p, bool with_final_state) {
  const char* symbols = o.cu_seqlens ? "(sequence, dim, width - 1)" : "(batch, dim, width - 1)";
  if (o.initial_state) check_dim("initial_state", *o.initial_state, symbols, 3);
  DeviceSequences found = device_sequences(o.x, p.batch, p.seqlen, o.seq_idx, o.cu_seqlens,
                                           (o.initial_state || with_final_state) && p.width > 1);
  if (o.initial_state) {
    check_shape("initial_state", *o.initial_state, symbols,
                {found.sequences.slots(), p.dim, p.width - 1});
  }
  return found;
}

void fill_inputs(const Operands& o, const DeviceSequences& found, cuda::Inputs& p) {
  p.sequences = found.sequences;
  p.x = view<3>("x", o.x);
  p.weight = view<2>("weight", o.weight);
  p.bias = view<1>("bias", o.bias);
  p.initial_state = view<3>("initial_state", o.initial_state);
}

std::tuple<Tensor, Tensor> causal_conv1d_fwd(const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias,
                                             const OptionalTensor& initial_state,
                                             const OptionalTensor& seq_idx,
                                             const OptionalTensor& cu_seqlens, bool silu,
                                             std::string mode, std::optional<ScalarType> out_dtype,
                                             bool return_final_state) {
  const Operands o{x, weight, bias, initial_state, seq_idx, cu_seqlens};
  cuda::FwdParams p{};
  static_cast<Shape&>(p) = check(o, silu, mode);
  check_no_state(p, initial_state, return_final_state);
  const DeviceSequences found = find_sequences(o, p, return_final_state);
  const OnDevice device(x);
  Tensor y = empty_like(x, out_dtype ? *out_dtype : x.scalar_type());
  const Sizes state_sizes{found.sequences.slots(), p.dim, p.width - 1};
  Tensor final_state =
      empty(x, return_final_state ? state_sizes : Sizes{0}, state_dtype(x, initial_state));
  fill_inputs(o, found, p);
  p.y = view<3>("out_dtype", y);
  if (return_final_state) p.final_state = view<3>("final_state", final_state);
  cuda::fwd(p, device.stream);
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(
    const OptionalTensor& dy, const OptionalTensor& dfinal_state, const Tensor& x,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
    const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, bool silu, std::string mode) {
  const Operands o{x, weight, bias, initial_state, seq_idx, cu_seqlens};
  cuda::BwdParams p{};
  static_cast<Shape&>(p) = check(o, silu, mode);
  check_no_state(p, initial_state, dfinal_state.has_value());
  const DeviceSequences found = find_sequences(o, p, dfinal_state.has_value());
  if (dy) {
    check_same_device("dy", *dy, x);
    check_shape("dy", *dy, "(batch, dim, seqlen)", {p.batch, p.dim, p.seqlen});
  }
  if (dfinal_state) {
    check_same_device("dfinal_state", *dfinal_state, x);
    check_shape("dfinal_state", *dfinal_state, "(sequence, dim, width - 1)",
                {found.sequences.slots(), p.dim, p.width - 1});
  }

  const OnDevice device(x);
  const ScalarType compute = scalar_type(p.compute);
  Tensor dx = empty_like(x, x.scalar_type());
  Tensor dweight = empty_like(weight, weight.scalar_type());
  Tensor dbias = bias ? empty_like(*bias, bias->scalar_type()) : empty(x, {0}, compute);
  Tensor dinitial_state = initial_state ? empty_like(*initial_state, initial_state->scalar_type())
                                        : empty(x, {0}, compute);
  fill_inputs(o, found, p);
  p.dy = view<3>("dy", dy);
  p.dfinal_state = view<3>("dfinal_state", dfinal_state);
  p.dx = view<3>("dx", dx);
  p.dweight = view<2>("dweight", dweight);
  if (bias) p.dbias = view<1>("dbias", dbias);
  if (initial_state) p.dinitial_state = view<3>("dinitial_state", dinitial_state);
  cuda::plan(p);
  Tensor partial = empty(x, {p.rows(), p.width + 1, p.dim}, compute);
  p.partial = partial.data_ptr();
  cuda::bwd(p, device.stream);
  return {dx, dweight, dbias, dinitial_state};
}

Tensor causal_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                            const OptionalTensor& bias, bool silu,
                            const OptionalTensor& cache_seqlens,
                            const OptionalTensor& conv_state_indices) {
  cuda::UpdateParams p{};
  static_cast<UpdateShape&>(p) =
      check(UpdateOperands{x, conv_state, weight, bias, cache_seqlens, conv_state_indices}, silu);
  if (conv_state_indices) p.slot_of = index_view("conv_state_indices", *conv_state_indices, x);
  if (cache_seqlens) p.positions = index_view("cache_seqlens", *cache_seqlens, x);
  const OnDevice device(x);
  Tensor y = empty_like(x, x.scalar_type());
  p.x = token_view("x", x);
  p.y = token_view("y", y);
  p.state = view<3>("conv_state", conv_state);
  p.weight = view<2>("weight", weight);
  p.bias = view<1>("bias", bias);
  cuda::update(p, device.stream);
  return y;
}

Tensor causal_conv1d_varlen_states(const Tensor& x, const Tensor& cu_seqlens, int64_t state_len) {
  check_varlen_states(x, state_len);
  cuda::VarlenStatesParams p{};
  p.sequences = device_sequences(x, 1, x.size(0), {}, cu_seqlens, false).sequences;
  p.dim = x.size(1), p.state_len = state_len;
  p.x.dtype = float_dtype("x", x);
  const OnDevice device(x);
  Tensor states = empty(x, {p.sequences.count, p.dim, state_len}, x.scalar_type());
  p.x.data = x.data_ptr();
  p.x.stride[1] = x.stride(1), p.x.stride[2] = x.stride(0);
  p.states = view<3>("states", states);
  cuda::varlen_states(p, device.stream);
  return states;
}

}  // namespace

STATESCAN_CUDA_IMPL(m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd));
  m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
  m.impl("causal_conv1d_varlen_states", TORCH_BOX(&causal_conv1d_varlen_states));
}

}  // namespace statescan::bindings
