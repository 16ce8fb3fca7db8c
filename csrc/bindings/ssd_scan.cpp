#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "bindings/device.h"
#include "bindings/segments.h"
#include "bindings/ssd_scan.h"
#include "common/sum_partials.h"
#include "ssd_scan/kernels.h"

namespace statescan::bindings {
namespace {

using namespace ssd_scan;  // FwdParams, BwdParams, ...

Problem check(const SsdOperands& x) {
  Problem p{};
  static_cast<Shape&>(p) = check_ssd(x);
  p.bfloat16 = isa() == Isa::kAvx512Bf16 && is_bfloat16(x, p);
  return p;
}

Sequences find_sequences(const SsdOperands& x, const Problem& p) {
  Sequences found =
      sequences(p.batch, p.seqlen, x.seq_idx, x.cu_seqlens, x.initial_states, 4, p.reverse);
  check_initial_states(x, p, found.slots, found.slots_by_id);
  return found;
}

Sizes state_sizes(const Problem& p, const Sequences& found) {
  return ssd_state_sizes(p, found.slots, found.slots_by_id);
}

// Heads that share a task, at most 8: by then B, C and C B^T cost a few percent of a head's own
// work. Fewer where there would not be `tasks` of them.
int64_t heads_per_task(const Problem& p, int64_t rows, int64_t tasks) {
  const int64_t heads = p.group_heads(), others = std::max<int64_t>(rows * p.groups, 1);
  const int64_t parts = std::max((heads + 7) / 8, std::min((tasks + others - 1) / others, heads));
  return parts == 0 ? 1 : (heads + parts - 1) / parts;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ssd_scan_fwd(
    const Tensor& x, const OptionalTensor& dt, const OptionalTensor& A, const Tensor& B,
    const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& dt_bias, const OptionalTensor& log_decay,
    const OptionalTensor& initial_states, const OptionalTensor& seq_idx,
    const OptionalTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max, bool reverse,
    bool shift_output, int64_t chunk, std::optional<ScalarType> out_dtype, bool return_final_states,
    bool return_chunk_states, bool save_cell_states) {
  const OptionalTensor h0 = contiguous(initial_states);
  const SsdOperands in{
      x,  dt,      A,          B,           C,      D,      z,       dt_bias,      log_decay,
      h0, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, reverse, shift_output, chunk};
  FwdParams p{};
  static_cast<Problem&>(p) = check(in);
  const Sequences found = find_sequences(in, p);
  p.segments = &found.segments;
  fill(p, in);
  if (h0) p.initial_state = ssd_slot_view("initial_states", *h0);
  // How many heads share a task does not show in the forward's result.
  p.heads_per_task = heads_per_task(p, found.segments.rows(), 2 * torch::stable::get_num_threads());

  const ScalarType compute = scalar_type(p.compute);
  Tensor y = empty_like(x, out_dtype ? *out_dtype : x.scalar_type());
  Tensor final_states = empty(x, return_final_states ? state_sizes(p, found) : Sizes{0}, compute);
  Tensor chunk_states = empty(
      x, return_chunk_states ? Sizes{p.batch, p.chunks(), p.heads, p.headdim, p.state} : Sizes{0},
      compute);
  Tensor cell_states =
      empty(x, save_cell_states ? Sizes{p.batch, p.cells(), p.heads, p.state, p.headdim} : Sizes{0},
            scalar_type(p.cell_dtype()));
  p.y = view<4>("out_dtype", y);
  if (return_final_states) p.last_state = ssd_slot_view("final_states", final_states);
  if (return_chunk_states) p.chunk_states = view<5>("chunk_states", chunk_states);
  if (save_cell_states) p.cell_states = cell_states.data_ptr();
  run_tasks([](const FwdParams& q, const Range& r) { fwd(q, r); }, p, p.tasks(), p.scratch_bytes());
  return {y, final_states, chunk_states, cell_states};
}

// out (head) or (head, headdim) = the sums of the row groups added up.
void add_up_heads(const Tensor& partial, const Tensor& out, const BwdParams& p) {
  partials::SumParams sum{};
  sum.partial = partial.data_ptr();
  sum.parts = partial.size(0);
  sum.size[0] = sum.size[1] = 1;
  sum.size[2] = p.heads, sum.size[3] = out.dim() == 2 ? p.headdim : 1;
  sum.count = sum.size[2] * sum.size[3];
  sum.compute = p.compute;
  sum.out.data = out.data_ptr();
  sum.out.dtype = float_dtype("gradient", out);
  sum.out.stride[2] = out.stride(0), sum.out.stride[3] = out.dim() == 2 ? out.stride(1) : 0;
  sum_partials(sum);
}

// out (batch, seqlen, group, state) = the sums (task of the group, batch, group, seqlen, state).
void add_up_tasks(const Tensor& partial, const Tensor& out, const BwdParams& p) {
  partials::SumParams sum{};
  sum.partial = partial.data_ptr();
  sum.parts = partial.size(0);
  sum.size[0] = p.batch, sum.size[1] = p.groups, sum.size[2] = p.seqlen, sum.size[3] = p.state;
  sum.count = p.batch * p.groups * p.seqlen * p.state;
  sum.compute = p.compute;
  sum.out = view<4>("gradient", out);
  std::swap(sum.out.stride[1], sum.out.stride[2]);
  sum_partials(sum);
}

// (task of the group, batch, seqlen, group, state) of such sums, or of dB or dC themselves where a
// group has a single task.
View<5> parts_view(const Tensor& partial, const Tensor& out) {
  View<5> v;
  const Tensor& t = partial.numel() > 0 ? partial : out;
  v.data = t.data_ptr();
  v.dtype = float_dtype("gradient", t);
  const auto s = t.strides();
  if (partial.numel() > 0) {
    v.stride[0] = s[0], v.stride[1] = s[1], v.stride[2] = s[3], v.stride[3] = s[2];
    v.stride[4] = s[4];
  } else {
    for (int i = 0; i < 4; ++i) v.stride[i + 1] = s[i];
  }
  return v;
}

using BwdResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BwdResult ssd_scan_bwd(const OptionalTensor& dy, const OptionalTensor& dfinal_states,
                       const OptionalTensor& dchunk_states, const Tensor& x,
                       const OptionalTensor& dt, const OptionalTensor& A, const Tensor& B,
                       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                       const OptionalTensor& dt_bias, const OptionalTensor& log_decay,
                       const OptionalTensor& initial_states, const OptionalTensor& seq_idx,
                       const OptionalTensor& cu_seqlens, const Tensor& cell_states,
                       bool dt_softplus, double dt_min, double dt_max, bool reverse,
                       bool shift_output, int64_t chunk) {
  const OptionalTensor h0 = contiguous(initial_states), dlast = contiguous(dfinal_states);
  const SsdOperands in{
      x,  dt,      A,          B,           C,      D,      z,       dt_bias,      log_decay,
      h0, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, reverse, shift_output, chunk};
  BwdParams p{};
  static_cast<Problem&>(p) = check(in);
  const Sequences found = find_sequences(in, p);
  p.segments = &found.segments;
  fill(p, in);
  check_ssd_gradients(in, p, dy, dlast, dchunk_states, cell_states, state_sizes(p, found));
  if (h0) p.initial_state = ssd_slot_view("initial_states", *h0);
  if (dlast) p.dlast_state = ssd_slot_view("dfinal_states", *dlast);
  p.cell_states = cell_states.data_ptr();
  p.dy = view<4>("dy", dy);
  p.dchunk_states = view<5>("dchunk_states", dchunk_states);
  p.heads_per_task = heads_per_task(p, p.row_groups(), 6);

  // Without a task (no batch, no heads) nothing writes the gradients: they are zero.
  const bool nothing = p.tasks() == 0;
  const ScalarType compute = scalar_type(p.compute);
  auto like = [&](const OptionalTensor& t) {
    if (!t) return empty(x, {0}, compute);
    return nothing ? zeros(*t, sizes_of(*t), t->scalar_type()) : empty_like(*t, t->scalar_type());
  };
  Tensor dx = like(x), ddt = like(dt), dA = like(A), dB = like(B), dC = like(C), dD = like(D);
  Tensor dz = like(z), ddt_bias = like(dt_bias), dlog_decay = like(log_decay);
  Tensor dh0 = like(h0);
  if (nothing) return {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dlog_decay, dh0};
  p.dx = view<4>("dx", dx);
  p.ddt = log_decay ? view<3>("dlog_decay", dlog_decay) : view<3>("ddt", ddt);
  if (z) p.dz = view<4>("dz", dz);
  if (h0) p.dinitial_state = ssd_slot_view("dinitial_states", dh0);

  const int64_t groups = p.row_groups(), parts = p.tasks_per_group();
  const Sizes per_task = parts == 1 ? Sizes{0} : Sizes{parts, p.batch, p.groups, p.seqlen, p.state};
  Tensor dB_parts = empty(x, per_task, compute), dC_parts = empty(x, per_task, compute);
  Tensor dA_parts = empty(x, {groups, p.heads}, compute);
  Tensor dbias_parts = empty(x, {groups, p.heads}, compute);
  const bool wide_D = D && D->dim() == 2;
  Tensor dD_parts = empty(x, {groups, p.heads, wide_D ? p.headdim : 1}, compute);
  p.dB = parts_view(dB_parts, dB), p.dC = parts_view(dC_parts, dC);
  p.dA = dA_parts.data_ptr(), p.ddt_bias = dbias_parts.data_ptr(), p.dD = dD_parts.data_ptr();
  p.wide_D = wide_D;

  run_tasks([](const BwdParams& q, const Range& r) { bwd(q, r); }, p, p.tasks(), p.scratch_bytes());

  if (parts > 1) add_up_tasks(dB_parts, dB, p), add_up_tasks(dC_parts, dC, p);
  if (A) add_up_heads(dA_parts, dA, p);
  if (D) add_up_heads(dD_parts, dD, p);
  if (dt_bias) add_up_heads(dbias_parts, ddt_bias, p);
  return {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dlog_decay, dh0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(statescan, CPU, m) {
  m.impl("ssd_scan_fwd", TORCH_BOX(&ssd_scan_fwd));
  m.impl("ssd_scan_bwd", TORCH_BOX(&ssd_scan_bwd));
}

}  // namespace statescan::bindings
