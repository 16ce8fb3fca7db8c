// What the bindings of the selective scan along routes for the CPU and for CUDA share: checks, views
// and gradients.
#pragma once

#include <functional>

#include "bindings/tensor.h"
#include "selective_scan_2d/shape.h"

namespace statescan::bindings {

// The operands that forward and backward share.
struct RoutedOperands {
  const Tensor &u, &delta, &A, &B, &C;
  const OptionalTensor &D, &z, &delta_bias, &dt_weight, &weights, &initial_state;
  const Tensor& index;
};

// Sizes and flags from the operands, all of them checked, and their views. What the index table holds
// is not looked at.
selective_scan_2d::Problem check_routed_scan(const RoutedOperands& x, int64_t reset_period,
                                             bool carry, bool delta_softplus, bool merge,
                                             int64_t chunk);
void check_gradients(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                     const Tensor& chunk_states, const selective_scan_2d::Problem& p);

// Of each operand, in its shape and dtype; empty where there is none. With rows of delta for several
// channels ddelta and ddelta_bias have all channels: Python sums over those of a row.
struct Gradients {
  Tensor u, delta, A, B, C, D, z, delta_bias, dt_weight, weights, initial_state;
};
Gradients empty_gradients(const RoutedOperands& x, const selective_scan_2d::Problem& p);

// What is summed over channels (B, C, dt) comes in `parts` of the channels, what is summed over time in
// `groups` of the batch; all have a route axis. Without work (`nothing`) they are zero.
struct PartialSums {
  Tensor A, B, C, D, delta_bias, dt, dt_weight, weights;
};
template <class BwdParams>
PartialSums partial_sums(const RoutedOperands& x, BwdParams& p, int64_t parts, int64_t groups,
                         bool nothing) {
  auto make = [&](void*& data, bool wanted, Sizes sizes) {
    if (nothing) sizes[0] = 1;
    if (!wanted) sizes = {0};
    const ScalarType compute = scalar_type(p.compute);
    Tensor t = nothing ? zeros(x.u, sizes, compute) : empty(x.u, sizes, compute);
    data = t.data_ptr();
    return t;
  };
  return {make(p.dA, true, {groups, p.routes, p.dim, p.state}),
          make(p.dB, true, {parts, p.routes, p.batch, p.steps, p.state}),
          make(p.dC, true, {parts, p.routes, p.batch, p.steps, p.state}),
          make(p.dD, bool(x.D), {groups, p.routes, p.dim}),
          make(p.ddelta_bias, bool(x.delta_bias), {groups, p.routes, p.dim}),
          make(p.ddt, p.rank > 0, {parts, p.routes, p.batch, p.rank, p.steps}),
          make(p.ddt_weight, p.rank > 0, {groups, p.routes, p.dim, p.rank}),
          make(p.dweights, bool(x.weights), {groups, p.routes, p.dim})};
}

// add_up(partial, parts, size, out): out = the sum of that many parts of `size`, in their order.
using AddUp = std::function<void(const Tensor& partial, int64_t parts, const int64_t (&size)[4],
                                 const View<4>& out)>;
void add_up_gradients(const PartialSums& sums, const RoutedOperands& x,
                      const selective_scan_2d::Problem& p, const Gradients& g, const AddUp& add_up);

// (batch, route, dim, token) with channels innermost if `like` has them so.
Tensor empty_tokens(const Tensor& like, Sizes sizes, ScalarType dtype);

}  // namespace statescan::bindings
