#include <torch/csrc/stable/library.h>

#include "bindings/mamba2_step.h"
#include "bindings/runs.h"
#include "bindings/stream.h"
#include "gated_rms_norm/cuda.h"
#include "mamba2_step/cuda.h"

namespace statescan::bindings {
namespace {

using mamba2_step::cuda::Params;

Tensor mamba2_step(const Tensor& zxbcdt, const Tensor& conv_state, const Tensor& ssm_state,
                   const Tensor& conv_weight, const OptionalTensor& conv_bias,
                   const OptionalTensor& dt_bias, const Tensor& A, const OptionalTensor& D,
                   const OptionalTensor& norm_weight, double norm_eps, bool norm_before_gate,
                   std::optional<int64_t> norm_group_size, bool silu, bool dt_softplus,
                   double dt_min, double dt_max, const OptionalTensor& cache_seqlens,
                   const OptionalTensor& state_batch_indices) {
  const StepArguments in{zxbcdt,
                         conv_state,
                         ssm_state,
                         conv_weight,
                         A,
                         conv_bias,
                         dt_bias,
                         D,
                         norm_weight,
                         cache_seqlens,
                         state_batch_indices,
                         norm_eps,
                         norm_before_gate,
                         norm_group_size,
                         silu,
                         dt_softplus,
                         dt_min,
                         dt_max};
  StepViews views = check(in);
  Params p{};
  if (cache_seqlens) p.conv.positions = index_view("cache_seqlens", *cache_seqlens, ssm_state);
  if (state_batch_indices) {
    p.conv.slot_of = index_view("state_batch_indices", *state_batch_indices, ssm_state);
  }
  const OnDevice device(ssm_state);
  const Tensor y = new_rows(in, views);
  views.step.y = view_of_heads(y, views);
  const auto fill_in = [&](void* convolved) {
    const View<3> xBC = place_convolved(convolved, views);
    fill(views, xBC, p.conv);
    static_cast<selective_state_update::Shape&>(p.step) = views.step;
    p.step.slot_of = p.conv.slot_of;
  };
  fill_in(nullptr);
  OptionalTensor convolved;
  if (!in_one_launch(p)) {
    convolved = empty(zxbcdt, views.convolved_sizes(), zxbcdt.scalar_type());
    fill_in(convolved->data_ptr());
  }
  step(p, device.stream);
  if (!norm_weight) return y;
  const Tensor out = new_rows(in, views);
  gated_rms_norm::cuda::FwdParams norm{};
  fill(views, y, out, norm);
  gated_rms_norm::cuda::fwd(norm, device.stream);
  return out;
}

}  // namespace

STATESCAN_CUDA_IMPL(m) { m.impl("mamba2_step", TORCH_BOX(&mamba2_step)); }

}  // namespace statescan::bindings
