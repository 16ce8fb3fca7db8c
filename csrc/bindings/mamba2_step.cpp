#include <torch/csrc/stable/library.h>

#include "bindings/device.h"
#include "bindings/mamba2_step.h"
#include "causal_conv1d/kernels.h"
#include "gated_rms_norm/kernels.h"
#include "selective_state_update/kernels.h"

namespace statescan::bindings {
namespace {

struct Places {
  const int64_t *slot_of, *positions;  // or null
};

void update_conv(const StepViews& views, const Places& at, const View<3>& xBC) {
  causal_conv1d::UpdateParams p{};
  fill(views, xBC, p);
  p.slot_of = at.slot_of, p.positions = at.positions;
  run_tasks(
      [](const causal_conv1d::UpdateParams& q, const Range& r) { causal_conv1d::update(q, r); }, p,
      p.tasks(), p.scratch_bytes(), p.grain());
}

void update_state(const StepViews& views, const Places& at) {
  using selective_state_update::Params;
  Params p{};
  static_cast<selective_state_update::Shape&>(p) = views.step;
  p.slot_of = at.slot_of;
  run_tasks([](const Params& q, const Range& r) { selective_state_update::update(q, r); }, p,
            p.tasks(), p.scratch_bytes(), p.grain());
}

void normalize(const StepViews& views, const Tensor& y, const Tensor& out) {
  using gated_rms_norm::FwdParams;
  FwdParams p{};
  fill(views, y, out, p);
  p.in_place = (p.x.dtype == DType::kFloat64) == (p.compute == DType::kFloat64) &&
               (p.z.stride[gated_rms_norm::kLead] == 1 || p.dim == 1);
  if (p.dim == 0) return;
  run_tasks([](const FwdParams& q, const Range& r) { gated_rms_norm::fwd(q, r); }, p, p.tasks(),
            p.scratch_bytes(), p.grain(p.tasks()));
}

// One call for all of it: at a batch of one what goes on around the kernels takes as long as they
// do. From one to the next numbers are rounded to zxbcdt's dtype, so that they are those of several
// calls.
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
  check_cpu("ssm_state", ssm_state);
  std::vector<int64_t> slots, positions;
  if (state_batch_indices) {
    slots = slot_indices("state_batch_indices", *state_batch_indices, views.conv.batch,
                         views.conv.slots);
  }
  if (cache_seqlens) {
    check_cpu("cache_seqlens", *cache_seqlens);
    positions = integers("cache_seqlens", *cache_seqlens);
  }
  const Places at{state_batch_indices ? slots.data() : nullptr,
                  cache_seqlens ? positions.data() : nullptr};
  const Tensor convolved = empty(zxbcdt, views.convolved_sizes(), zxbcdt.scalar_type());
  const View<3> xBC = place_convolved(convolved.data_ptr(), views);
  const Tensor y = new_rows(in, views);
  views.step.y = view_of_heads(y, views);
  update_conv(views, at, xBC);
  update_state(views, at);
  if (!norm_weight) return y;
  const Tensor out = new_rows(in, views);
  normalize(views, y, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) { m.impl("mamba2_step", TORCH_BOX(&mamba2_step)); }

}  // namespace statescan::bindings
