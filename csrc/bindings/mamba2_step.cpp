#include <torch/csrc/stable/library.h>

#include "bindings/device.h"
#include "bindings/mamba2_step.h"
#include "causal_conv1d/kernels.h"
#include "selective_state_update/kernels.h"

namespace statescan::bindings {
namespace {

namespace conv = causal_conv1d;
namespace ssm = selective_state_update;

// One call for both updates: at a batch of one what goes on around the kernels takes as long as they
// do. Between them x, B and C are in zxbcdt's dtype, so that the numbers are those of two calls.
Tensor mamba2_step(const Tensor& zxbcdt, const Tensor& conv_state, const Tensor& ssm_state,
                   const Tensor& conv_weight, const OptionalTensor& conv_bias,
                   const OptionalTensor& dt_bias, const Tensor& A, const OptionalTensor& D,
                   bool gate, bool silu, bool dt_softplus, double dt_min, double dt_max,
                   const OptionalTensor& cache_seqlens, const OptionalTensor& state_batch_indices) {
  const StepArguments in{zxbcdt,    conv_state, ssm_state,   conv_weight,   A,
                         conv_bias, dt_bias,    D,           cache_seqlens, state_batch_indices,
                         gate,      silu,       dt_softplus, dt_min,        dt_max};
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
  const int64_t* slot_of = state_batch_indices ? slots.data() : nullptr;
  const Tensor convolved = empty(zxbcdt, views.convolved_sizes(), zxbcdt.scalar_type());
  const View<3> xBC = place_convolved(convolved.data_ptr(), views);
  const Tensor y = output(in, views.step);

  conv::UpdateParams first{};
  fill(views, xBC, first);
  first.slot_of = slot_of, first.positions = cache_seqlens ? positions.data() : nullptr;
  run_tasks([](const conv::UpdateParams& q, const Range& r) { conv::update(q, r); }, first,
            first.tasks(), first.scratch_bytes(), first.grain());
  ssm::Params then{};
  static_cast<ssm::Shape&>(then) = views.step;
  then.slot_of = slot_of;
  run_tasks([](const ssm::Params& q, const Range& r) { ssm::update(q, r); }, then, then.tasks(),
            then.scratch_bytes(), then.grain());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) { m.impl("mamba2_step", TORCH_BOX(&mamba2_step)); }

}  // namespace statescan::bindings
