#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/causal_conv1d.h"
#include "bindings/runs.h"
#include "bindings/stream.h"
#include "causal_conv1d/cuda.h"

namespace statescan::bindings {
namespace {

using namespace causal_conv1d;  // Shape, cuda::FwdParams, ...

DeviceSequences find_sequences(const Operands& o, const Shape& p, bool return_final_state) {
  const char* symbols = o.cu_seqlens ? "(sequence, dim, width - 1)" : "(batch, dim, width - 1)";
  if (o.initial_state) check_dim("initial_state", *o.initial_state, symbols, 3);
  DeviceSequences found = device_sequences(o.x, p.batch, p.seqlen, o.seq_idx, o.cu_seqlens,
                                           (o.initial_state || return_final_state) && p.width > 1);
  if (o.initial_state) {
    check_shape("initial_state", *o.initial_state, symbols,
                {found.sequences.slots(), p.dim, p.width - 1});
  }
  return found;
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
  p.sequences = found.sequences;

  const OnDevice device(x);
  Tensor y = empty_like(x, out_dtype ? *out_dtype : x.scalar_type());
  const Sizes state_sizes{p.sequences.slots(), p.dim, p.width - 1};
  Tensor final_state =
      empty(x, return_final_state ? state_sizes : Sizes{0}, state_dtype(x, initial_state));
  p.x = view<3>("x", x);
  p.weight = view<2>("weight", weight);
  p.bias = view<1>("bias", bias);
  p.initial_state = view<3>("initial_state", initial_state);
  p.y = view<3>("out_dtype", y);
  if (return_final_state) p.final_state = view<3>("final_state", final_state);
  cuda::fwd(p, device.stream);
  return {y, final_state};
}

}  // namespace

STATESCAN_CUDA_IMPL(m) { m.impl("causal_conv1d_fwd", TORCH_BOX(&causal_conv1d_fwd)); }

}  // namespace statescan::bindings
