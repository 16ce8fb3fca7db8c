#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "bindings/device.h"
#include "bindings/segments.h"
#include "bindings/selective_scan.h"
#include "bindings/tensor.h"
#include "common/sum_partials.h"
#include "selective_scan/kernels.h"

namespace statescan::bindings {
namespace {

using namespace selective_scan;  // FwdParams, BwdParams, ...

Sequences find_sequences(const ScanOperands& x, const Problem& p) {
  Sequences found =
      sequences(p.batch, p.seqlen, x.seq_idx, x.cu_seqlens, x.initial_state, 3, p.reverse);
  if (x.initial_state && found.slots_by_id) {
    check_shape("initial_state", *x.initial_state, "(batch, sequence, dim, state)",
                {p.batch, x.initial_state->size(1), p.dim, p.state});
  } else if (x.initial_state) {
    check_shape("initial_state", *x.initial_state,
                x.cu_seqlens ? "(sequence, dim, state)" : "(batch, dim, state)",
                {found.slots, p.dim, p.state});
  }
  return found;
}

// (slot, dim, state) of a contiguous tensor of states that may have an axis of sequences.
View<3> slot_view(const char* name, const Tensor& t) {
  View<3> v;
  v.data = t.data_ptr();
  v.dtype = float_dtype(name, t);
  const int64_t last = t.dim() - 1;
  v.stride[0] = t.stride(last - 2), v.stride[1] = t.stride(last - 1), v.stride[2] = t.stride(last);
  return v;
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

template <class Params>
void fill(Params& params, const ScanOperands& x) {
  params.u = view<3>("u", x.u);
  params.delta = view<3>("delta", x.delta);
  params.A = view<2>("A", x.A);
  params.B = projection_view("B", x.B);
  params.C = projection_view("C", x.C);
  params.D = view<1>("D", x.D);
  params.z = view<3>("z", x.z);
  params.delta_bias = view<1>("delta_bias", x.delta_bias);
}

// (batch, sequence, dim, state) or (slot, dim, state)
Sizes state_sizes(const Problem& p, const Sequences& found) {
  if (!found.slots_by_id) return {found.slots, p.dim, p.state};
  return {p.batch, p.batch == 0 ? 0 : found.slots / p.batch, p.dim, p.state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_scan_fwd(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
    const OptionalTensor& cu_seqlens, bool delta_softplus, bool reverse,
    std::optional<ScalarType> out_dtype, int64_t chunk, bool return_states,
    bool save_chunk_states) {
  const OptionalTensor h0 = contiguous(initial_state);
  const ScanOperands x{u, delta, A, B, C, D, z, delta_bias, h0, seq_idx, cu_seqlens};
  FwdParams p{};
  static_cast<Shape&>(p) = check_scan(x, delta_softplus, reverse, chunk);
  const Sequences found = find_sequences(x, p);
  p.segments = &found.segments;
  fill(p, x);
  if (h0) p.initial_state = slot_view("initial_state", *h0);

  const ScalarType compute = scalar_type(p.compute);
  Tensor y = empty_like(u, out_dtype ? *out_dtype : u.scalar_type());
  Tensor last_state = empty(u, state_sizes(p, found), compute);
  Tensor states =
      empty(u, return_states ? Sizes{p.batch, p.seqlen, p.dim, p.state} : Sizes{0}, compute);
  Tensor chunk_states =
      empty(u, save_chunk_states ? Sizes{p.batch, p.chunks(), p.state, p.dim} : Sizes{0}, compute);
  p.y = view<3>("out_dtype", y);
  p.last_state = slot_view("last_state", last_state);
  if (return_states) p.states = view<4>("states", states);
  if (save_chunk_states) p.chunk_states = chunk_states.data_ptr();
  run_tasks([](const FwdParams& q, const Range& r) { fwd(q, r); }, p, p.tasks(), p.scratch_bytes());
  return {y, last_state, states, chunk_states};
}

// out = the partial sums added up, with `out` of these sizes.
void add_up(const Tensor& partial, DType compute, const int64_t (&size)[4], const View<4>& out) {
  partials::SumParams p{};
  p.partial = partial.data_ptr();
  p.parts = partial.size(0);
  p.count = size[0] * size[1] * size[2] * size[3];
  for (int i = 0; i < 4; ++i) p.size[i] = size[i];
  p.compute = compute;
  p.out = out;
  sum_partials(p);
}

// A gradient that is summed over row groups: (dim) or (dim, state).
void add_up_rows(const Tensor& partial, const Tensor& out, const BwdParams& p) {
  const int64_t state = out.dim() == 2 ? p.state : 1;
  View<4> v;
  v.data = out.data_ptr();
  v.dtype = float_dtype("gradient", out);
  v.stride[2] = out.stride(0), v.stride[3] = out.dim() == 2 ? out.stride(1) : 0;
  add_up(partial, p.compute, {1, 1, p.dim, state}, v);
}

// dB or dC that varies in time: the partial sums are (batch, group, seqlen, state).
void add_up_tasks(const Tensor& partial, const Tensor& out, const BwdParams& p) {
  View<4> v = projection_view("gradient", out);  // (batch, group, state, seqlen)
  std::swap(v.stride[2], v.stride[3]);
  add_up(partial, p.compute, {p.batch, p.groups, p.seqlen, p.state}, v);
}

using BwdResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BwdResult selective_scan_bwd(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                             const OptionalTensor& dstates, const Tensor& u, const Tensor& delta,
                             const Tensor& A, const Tensor& B, const Tensor& C,
                             const OptionalTensor& D, const OptionalTensor& z,
                             const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                             const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
                             const Tensor& chunk_states, bool delta_softplus, bool reverse,
                             int64_t chunk) {
  const OptionalTensor h0 = contiguous(initial_state), dlast = contiguous(dlast_state);
  const ScanOperands x{u, delta, A, B, C, D, z, delta_bias, h0, seq_idx, cu_seqlens};
  BwdParams p{};
  static_cast<Shape&>(p) = check_scan(x, delta_softplus, reverse, chunk);
  const Sequences found = find_sequences(x, p);
  p.segments = &found.segments;
  fill(p, x);
  check_shape("chunk_states", chunk_states, "(batch, chunk, state, dim)",
              {p.batch, p.chunks(), p.state, p.dim});
  if (dy) check_shape("dy", *dy, "(batch, dim, seqlen)", {p.batch, p.dim, p.seqlen});
  if (dlast) check_shape("dlast_state", *dlast, "of last_state", state_sizes(p, found));
  if (dstates) {
    check_shape("dstates", *dstates, "(batch, seqlen, dim, state)",
                {p.batch, p.seqlen, p.dim, p.state});
  }
  if (h0) p.initial_state = slot_view("initial_state", *h0);
  if (dlast) p.dlast_state = slot_view("dlast_state", *dlast);
  p.chunk_states = chunk_states.data_ptr();
  p.dy = view<3>("dy", dy);
  p.dstates = view<4>("dstates", dstates);

  const ScalarType compute = scalar_type(p.compute);
  auto like = [&](const OptionalTensor& t) {
    return t ? empty_like(*t, t->scalar_type()) : empty(u, {0}, compute);
  };
  Tensor du = like(u), dA = like(A), dB = like(B), dC = like(C), dD = like(D), dz = like(z);
  Tensor ddelta_bias = like(delta_bias);
  Tensor ddelta = p.delta_repeat == 1 ? like(delta) : empty(u, {p.batch, p.dim, p.seqlen}, compute);
  Tensor dh0 = initial_state ? empty(u, state_sizes(p, found), initial_state->scalar_type())
                             : empty(u, {0}, compute);
  p.du = view<3>("du", du);
  p.ddelta = view<3>("ddelta", ddelta);
  if (z) p.dz = view<3>("dz", dz);
  if (h0) p.dinitial_state = slot_view("dinitial_state", dh0);

  // Without a task (no batch, no channels) nothing writes the partial sums: the gradients are zero.
  const bool nothing = p.tasks() == 0;
  const int64_t parts = nothing ? 1 : p.row_groups();
  auto partial = [&](const Sizes& sizes) {
    return nothing ? zeros(u, sizes, compute) : empty(u, sizes, compute);
  };
  const Sizes per_row{parts, p.dim, p.state};
  const Sizes per_task{nothing ? 1 : p.tasks_per_group(), p.batch, p.groups, p.seqlen, p.state};
  Tensor dA_parts = partial(per_row);
  Tensor dB_parts = partial(p.constant_B ? per_row : per_task);
  Tensor dC_parts = partial(p.constant_C ? per_row : per_task);
  Tensor dD_parts = partial({parts, p.dim}), dbias_parts = partial({parts, p.dim});
  p.dA = dA_parts.data_ptr(), p.dB = dB_parts.data_ptr(), p.dC = dC_parts.data_ptr();
  p.dD = dD_parts.data_ptr(), p.ddelta_bias = dbias_parts.data_ptr();

  run_tasks([](const BwdParams& q, const Range& r) { bwd(q, r); }, p, p.tasks(), p.scratch_bytes());

  add_up_rows(dA_parts, dA, p);
  p.constant_B ? add_up_rows(dB_parts, dB, p) : add_up_tasks(dB_parts, dB, p);
  p.constant_C ? add_up_rows(dC_parts, dC, p) : add_up_tasks(dC_parts, dC, p);
  if (D) add_up_rows(dD_parts, dD, p);
  if (delta_bias) {
    if (p.delta_repeat == 1) {
      add_up_rows(dbias_parts, ddelta_bias, p);
    } else {  // Python sums it over the channels of a row, like ddelta
      ddelta_bias = empty(u, {p.dim}, compute);
      add_up_rows(dbias_parts, ddelta_bias, p);
    }
  }
  return {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dh0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&selective_scan_bwd));
}

}  // namespace statescan::bindings
