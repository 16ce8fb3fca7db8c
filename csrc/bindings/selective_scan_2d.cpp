#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "bindings/device.h"
#include "bindings/selective_scan_2d.h"
#include "common/sum_partials.h"
#include "selective_scan_2d/kernels.h"

namespace statescan::bindings {
namespace {

using namespace selective_scan_2d;  // FwdParams, BwdParams, ...

template <class T>
void check_tokens_of(const Tensor& index, int64_t tokens) {
  const T* data = static_cast<const T*>(index.data_ptr());
  if (index.size(0) == 0 || index.size(2) == 0) return;
  T least = data[0], greatest = data[0];
  for (int64_t b = 0; b < index.size(0); ++b) {
    for (int64_t k = 0; k < index.size(1); ++k) {
      const T* row = data + b * index.stride(0) + k * index.stride(1);
      for (int64_t t = 0; t < index.size(2); ++t) {
        least = std::min(least, row[t * index.stride(2)]);
        greatest = std::max(greatest, row[t * index.stride(2)]);
      }
    }
  }
  if (least >= -2 && int64_t(greatest) < tokens) return;
  fail("routes must hold -2, -1 or a token below " + std::to_string(tokens) + ", got values from " +
       std::to_string(least) + " to " + std::to_string(greatest));
}

void check_tokens(const Tensor& index, const Problem& p) {
  if (p.index_is_wide) return check_tokens_of<int64_t>(index, p.tokens);
  check_tokens_of<int32_t>(index, p.tokens);
}

Problem check_on_cpu(const RoutedOperands& x, int64_t reset_period, bool carry, bool delta_softplus,
                     bool merge, int64_t chunk) {
  const Problem p = check_routed_scan(x, reset_period, carry, delta_softplus, merge, chunk);
  check_tokens(x.index, p);
  if (chunk < 1 || chunk > kMaxChunk) {
    fail("chunk must be from 1 to " + std::to_string(kMaxChunk) + ", got " + std::to_string(chunk));
  }
  return p;
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_2d_fwd(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& dt_weight, const OptionalTensor& weights,
    const OptionalTensor& initial_state, const Tensor& index, int64_t reset_period, bool carry,
    bool delta_softplus, bool merge, std::optional<ScalarType> out_dtype, int64_t chunk,
    bool save_chunk_states) {
  const RoutedOperands x{u,       delta,         A,    B, C, D, z, delta_bias, dt_weight,
                         weights, initial_state, index};
  FwdParams p{};
  static_cast<Problem&>(p) = check_on_cpu(x, reset_period, carry, delta_softplus, merge, chunk);
  const ScalarType compute = scalar_type(p.compute);
  Tensor y = empty_tokens(u, {p.batch, merge ? 1 : p.routes, p.dim, p.tokens},
                          out_dtype ? *out_dtype : u.scalar_type());
  Tensor last_state = empty(u, {p.batch, carry ? 1 : p.routes, p.dim, p.state}, compute);
  Tensor chunk_states =
      empty(u, save_chunk_states ? Sizes{p.batch, p.routes, p.chunks(), p.state, p.dim} : Sizes{0},
            compute);
  p.y = view<4>("out_dtype", y);
  p.last_state = view<4>("last_state", last_state);
  if (save_chunk_states) p.chunk_states = chunk_states.data_ptr();
  run_tasks([](const FwdParams& q, const Range& r) { fwd(q, r); }, p, p.tasks(), p.scratch_bytes());
  return {y, last_state, chunk_states};
}

void add_up(const Tensor& partial, int64_t parts, const int64_t (&size)[4], const View<4>& out,
            DType compute) {
  partials::SumParams sum{};
  sum.compute = compute;
  sum.parts = parts;
  sum.count = size[0] * size[1] * size[2] * size[3];
  for (int i = 0; i < 4; ++i) sum.size[i] = size[i];
  sum.partial = partial.data_ptr();
  sum.out = out;
  sum_partials(sum);
}

using BwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor>;

BwdResult selective_scan_2d_bwd(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                                const Tensor& u, const Tensor& delta, const Tensor& A,
                                const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                const OptionalTensor& z, const OptionalTensor& delta_bias,
                                const OptionalTensor& dt_weight, const OptionalTensor& weights,
                                const OptionalTensor& initial_state, const Tensor& index,
                                const Tensor& chunk_states, int64_t reset_period, bool carry,
                                bool delta_softplus, bool merge, int64_t chunk) {
  const RoutedOperands x{u,       delta,         A,    B, C, D, z, delta_bias, dt_weight,
                         weights, initial_state, index};
  BwdParams p{};
  static_cast<Problem&>(p) = check_on_cpu(x, reset_period, carry, delta_softplus, merge, chunk);
  check_gradients(dy, dlast_state, chunk_states, p);
  p.chunk_states = chunk_states.data_ptr();
  p.dy = view<4>("dy", dy);
  p.dlast_state = view<4>("dlast_state", dlast_state);

  Gradients g = empty_gradients(x, p);
  p.du = view<4>("du", g.u);
  p.ddelta = view<4>("ddelta", g.delta);
  if (z) p.dz = view<3>("dz", g.z);
  if (initial_state) p.dinitial_state = view<4>("dinitial_state", g.initial_state);

  const bool nothing = p.tasks() == 0;
  const PartialSums sums = partial_sums(x, p, p.channel_tasks(), p.row_groups(), nothing);
  run_tasks([](const BwdParams& q, const Range& r) { bwd(q, r); }, p, p.tasks(), p.scratch_bytes());
  add_up_gradients(sums, x, p, g,
                   [&](const Tensor& partial, int64_t parts, const int64_t (&size)[4],
                       const View<4>& out) { add_up(partial, parts, size, out, p.compute); });
  return {g.u,       g.delta,        g.A, g.B, g.C, g.D, g.z, g.delta_bias, g.dt_weight,
          g.weights, g.initial_state};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("selective_scan_2d_fwd", TORCH_BOX(&selective_scan_2d_fwd));
  m.impl("selective_scan_2d_bwd", TORCH_BOX(&selective_scan_2d_bwd));
}

}  // namespace statescan::bindings
