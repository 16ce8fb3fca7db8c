#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "bindings/selective_scan_2d.h"
#include "bindings/stream.h"
#include "common/arrays.cuh"
#include "selective_scan_2d/cuda.h"

namespace statescan::bindings {
namespace {

using namespace selective_scan_2d;  // Problem, cuda::FwdParams, ...

Problem check_on_gpu(const RoutedOperands& x, int64_t reset_period, bool carry, bool delta_softplus,
                     bool merge, int64_t chunk) {
  const Problem p = check_routed_scan(x, reset_period, carry, delta_softplus, merge, chunk);
  const bool is_double = p.compute == DType::kFloat64;
  if (chunk == cuda::kShortTile || (chunk == cuda::kLongTile && !is_double)) return p;
  fail("chunk must be " + std::to_string(cuda::kShortTile) +
       (is_double ? "" : " or " + std::to_string(cuda::kLongTile)) + " on a GPU, got " +
       std::to_string(chunk));
}

// What the kernels work in, besides the results.
using Memory = std::vector<Tensor>;

// Of routes that are walked in parts.
Memory prepare_parts(const RoutedOperands& x, bool backward, cudaStream_t stream, cuda::Inputs& p) {
  Memory memory;
  auto floats = [&](float*& data, bool wanted, const Sizes& sizes) {
    if (!wanted) return;
    memory.push_back(empty(x.u, sizes, ScalarType::Float));
    data = static_cast<float*>(memory.back().data_ptr());
  };
  cuda::Parts& parts = p.parts;
  const Sizes states{p.batch, p.routes, parts.count, p.state, p.dim};
  floats(parts.u, true, {p.u_per_route ? p.routes : 1, parts.plane_elements});
  floats(parts.dy, backward, {p.y_per_route ? p.routes : 1, parts.plane_elements});
  floats(parts.y, !backward || p.z, {parts.at_once, parts.plane_elements});
  floats(parts.du, backward, {parts.at_once, parts.plane_elements});
  floats(parts.h, true, states);
  floats(parts.dh, backward, states);
  floats(parts.step_sums, true, {p.batch, p.routes, parts.count, p.dim});
  const int64_t tables = p.tables() * p.routes;
  memory.push_back(zeros(x.u, {tables * (p.tokens + 1)}, ScalarType::Int));
  parts.repeats = static_cast<int32_t*>(memory.back().data_ptr());
  cuda::find_repeats(p, parts.repeats + tables, stream);
  return memory;
}

Memory prepare(const RoutedOperands& x, bool backward, const OptionalTensor& dy,
               cudaStream_t stream, cuda::Inputs& p) {
  const int64_t shared_limit = shared_memory_of_block(x.u);
  p.plan = cuda::plan(p, backward, view<4>("dy", dy), shared_limit);
  p.parts = cuda::plan_parts(p, backward, p.plan, shared_limit);
  p.place_per_batch = p.index_stride[0] != 0;
  if (p.parts.count > 0) return prepare_parts(x, backward, stream, p);
  if (p.plan.channels == 0) {
    fail("state and rank must fit in shared memory on this GPU, got state = " +
         std::to_string(p.state) + " and rank = " + std::to_string(p.rank));
  }
  p.tiles = p.chunks();
  Memory memory{empty(x.u, {p.tables(), p.routes, p.tiles, p.chunk}, ScalarType::Int),
                empty(x.u, {p.tables(), p.routes, p.tiles}, ScalarType::Int)};
  int32_t* place = static_cast<int32_t*>(memory[0].data_ptr());
  int32_t* flags = static_cast<int32_t*>(memory[1].data_ptr());
  p.place = place, p.flags = flags;
  if (!p.plan.on_chip) {
    memory.push_back(empty(x.u, {p.plan.plane_elements}, scalar_type(p.compute)));
    p.planes = memory.back().data_ptr();
  }
  if (p.plan.pair.channels == 4 && p.D) {
    const int64_t visits = p.tables() * p.routes * p.tokens;
    memory.push_back(zeros(x.u, {visits + 1}, ScalarType::Int));
    p.visits = static_cast<int32_t*>(memory.back().data_ptr());
    p.visited_otherwise = p.visits + visits;
  }
  cuda::find_places(p, place, flags, stream);
  return memory;
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
  cuda::FwdParams p{};
  static_cast<Problem&>(p) = check_on_gpu(x, reset_period, carry, delta_softplus, merge, chunk);
  const OnDevice device(u);
  const Memory memory = prepare(x, false, {}, device.stream, p);

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
  p.parts.count > 0 ? cuda::fwd_in_parts(p, device.stream) : cuda::fwd(p, device.stream);
  return {y, last_state, chunk_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
selective_scan_2d_bwd(const OptionalTensor& dy, const OptionalTensor& dlast_state, const Tensor& u,
                      const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                      const OptionalTensor& D, const OptionalTensor& z,
                      const OptionalTensor& delta_bias, const OptionalTensor& dt_weight,
                      const OptionalTensor& weights, const OptionalTensor& initial_state,
                      const Tensor& index, const Tensor& chunk_states, int64_t reset_period,
                      bool carry, bool delta_softplus, bool merge, int64_t chunk) {
  const RoutedOperands x{u,       delta,         A,    B, C, D, z, delta_bias, dt_weight,
                         weights, initial_state, index};
  cuda::BwdParams p{};
  static_cast<Problem&>(p) = check_on_gpu(x, reset_period, carry, delta_softplus, merge, chunk);
  check_gradients(dy, dlast_state, chunk_states, p);
  if (dy) check_no_wider("dy", *dy, p.compute);
  check_same_device("chunk_states", chunk_states, u);
  if (dy) check_same_device("dy", *dy, u);
  if (dlast_state) check_same_device("dlast_state", *dlast_state, u);
  const OnDevice device(u);
  const Memory memory = prepare(x, true, dy, device.stream, p);
  p.chunk_states = chunk_states.data_ptr();
  p.dy = view<4>("dy", dy);
  p.dlast_state = view<4>("dlast_state", dlast_state);

  Gradients g = empty_gradients(x, p);
  p.du = view<4>("du", g.u);
  OptionalTensor ddelta_sum;  // over the routes
  if (p.rank == 0 && p.delta_shared) {
    ddelta_sum = empty(u, {p.batch, p.dim, p.steps}, scalar_type(p.compute));
    p.ddelta = {ddelta_sum->data_ptr(), p.compute, {p.dim * p.steps, 0, p.steps, 1}};
  } else {
    p.ddelta = view<4>("ddelta", g.delta);
  }
  if (z) p.dz = view<3>("dz", g.z);
  if (initial_state) p.dinitial_state = view<4>("dinitial_state", g.initial_state);

  const bool in_parts = p.parts.count > 0, nothing = !in_parts && p.batch * p.plan.blocks == 0;
  const PartialSums sums = in_parts
                               ? partial_sums(x, p, p.parts.groups, p.batch * p.parts.count, false)
                               : partial_sums(x, p, p.plan.blocks, p.batch, nothing);
  in_parts ? cuda::bwd_in_parts(p, device.stream) : cuda::bwd(p, device.stream);
  const AddUp add_up = [&](const Tensor& partial, int64_t parts, const int64_t (&size)[4],
                           const View<4>& out) {
    statescan::add_up(partial.data_ptr(), p.compute, parts, size, out, device.stream);
  };
  add_up_gradients(sums, x, p, g, add_up);
  if (ddelta_sum && !nothing) {
    View<4> out = view<4>("ddelta", g.delta);
    out.stride[1] = out.stride[0], out.stride[0] = 0;
    add_up(*ddelta_sum, 1, {1, p.batch, p.dim, p.steps}, out);
  }
  return {g.u,       g.delta,        g.A, g.B, g.C, g.D, g.z, g.delta_bias, g.dt_weight,
          g.weights, g.initial_state};
}

}  // namespace

STATESCAN_CUDA_IMPL(m) {
  m.impl("selective_scan_2d_fwd", TORCH_BOX(&selective_scan_2d_fwd));
  m.impl("selective_scan_2d_bwd", TORCH_BOX(&selective_scan_2d_bwd));
}

}  // namespace statescan::bindings
