#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "bindings/runs.h"
#include "bindings/ssd_scan.h"
#include "bindings/stream.h"
#include "common/arrays.cuh"
#include "common/marks.cuh"
#include "ssd_scan/cuda.h"

namespace statescan::bindings {
namespace {

using namespace ssd_scan;  // Shape, cuda::WalkParams, ...

// The memory of a call that is not a result.
struct Call {
  OptionalTensor ends, marks, carry, factor, scratch;
  Sizes state_sizes;  // (batch, sequence, head, headdim, state) or (slot, head, headdim, state)
};

cuda::Inputs inputs(const SsdOperands& x, Call& call) {
  cuda::Inputs p{};
  static_cast<Shape&>(p) = check_ssd(x);
  p.bfloat16 = is_bfloat16(x, p) && p.state <= cuda::kMostStates;
  p.shared_bytes = shared_memory_of_block(x.x);
  p.processors = processors_of(x.x);
  p.hopper = is_hopper(x.x) && !only_portable();
  const bool by_id = x.seq_idx && x.initial_states && x.initial_states->dim() == 5;
  DeviceSequences found = device_sequences(x.x, p.batch, p.seqlen, x.seq_idx, x.cu_seqlens, !by_id);
  p.sequences = found.sequences, call.ends = found.ends;
  p.slots_per_row = by_id ? x.initial_states->size(1) : 0;
  check_initial_states(x, p, p.slots(), by_id);
  call.state_sizes = ssd_state_sizes(p, p.slots(), by_id);
  fill(p, x);
  return p;
}

// What the tokens are, where that is not plain.
void mark(const SsdOperands& x, cuda::Inputs& p, cudaStream_t stream, Call& call) {
  if (!x.cu_seqlens && !x.seq_idx) return;
  call.marks = empty(x.x, {p.batch, p.seqlen}, ScalarType::Int);
  auto* marks = static_cast<int32_t*>(call.marks->data_ptr());
  find_marks(p.sequences, p.slots_per_row, p.reverse, marks, stream);
  p.marks = marks;
}

Tensor scratch(const Tensor& like, const cuda::Room& room, DType compute) {
  return empty(like, {room.is_shared ? 0 : room.elements * room.blocks}, scalar_type(compute));
}

// Walks, with the memory that it takes.
void walk(const Tensor& like, cuda::WalkParams& p, cudaStream_t stream, Call& call) {
  const ScalarType compute = scalar_type(p.compute);
  p.parts = cuda::parts_of(p);
  if (p.parts > 1) {
    call.carry = empty(like, {p.parts, p.batch, p.heads, p.state, p.headdim}, compute);
    call.factor = empty(like, {p.parts, p.batch, p.heads}, compute);
    p.carry = call.carry->data_ptr(), p.factor = call.factor->data_ptr();
  }
  const cuda::Room room = cuda::walk_room(p);
  call.scratch = scratch(like, room, p.compute);
  if (!room.is_shared) p.scratch = call.scratch->data_ptr();
  cuda::walk(p, stream);
}

// (slot, head * headdim, state) of contiguous states.
View<3> flat_states(const char* name, const OptionalTensor& t, const Shape& p) {
  if (!t) return {};
  return {t->data_ptr(), float_dtype(name, *t), {p.heads * p.headdim * p.state, p.state, 1}};
}

// States in the compute type, as tensor cores' kernels want them: a copy where they are not so.
OptionalTensor in_compute(const char* name, const OptionalTensor& t, const Shape& p, int64_t slots,
                          cudaStream_t stream) {
  if (!t || float_dtype(name, *t) == p.compute) return t;
  Tensor copy = empty(*t, sizes_of(*t), scalar_type(p.compute));
  copy_states(flat_states(name, t, p), flat_states(name, copy, p), slots, p.heads * p.headdim,
              p.state, stream);
  return copy;
}

// Where sequences may have no tokens, their last state is their first one.
void begin_states(const OptionalTensor& from, const Tensor& to, const cuda::Inputs& p,
                  cudaStream_t stream) {
  if (p.marks == nullptr && p.seqlen > 0) return;
  copy_states(flat_states("initial_states", from, p), flat_states("states", to, p), p.slots(),
              p.heads * p.headdim, p.state, stream);
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
  Call call;
  const OnDevice device(x);
  cuda::WalkParams p{};
  static_cast<cuda::Inputs&>(p) = inputs(in, call);
  mark(in, p, device.stream, call);

  const ScalarType compute = scalar_type(p.compute);
  Tensor y = empty_like(x, out_dtype ? *out_dtype : x.scalar_type());
  Tensor final_states = empty(x, return_final_states ? call.state_sizes : Sizes{0}, compute);
  Tensor chunk_states = empty(
      x, return_chunk_states ? Sizes{p.batch, p.chunks(), p.heads, p.headdim, p.state} : Sizes{0},
      compute);
  Tensor cell_states =
      empty(x, save_cell_states ? Sizes{p.batch, p.cells(), p.heads, p.state, p.headdim} : Sizes{0},
            scalar_type(p.cell_dtype()));
  p.y = view<4>("out_dtype", y);
  const OptionalTensor enter = in_compute("initial_states", h0, p, p.slots(), device.stream);
  if (enter) p.enter = ssd_slot_view("initial_states", *enter);
  if (return_final_states) {
    p.leave = ssd_slot_view("final_states", final_states);
    begin_states(h0, final_states, p, device.stream);
  }
  if (return_chunk_states) p.chunk_states = view<5>("chunk_states", chunk_states);
  if (save_cell_states) p.cell_states = cell_states.data_ptr();
  walk(x, p, device.stream, call);
  return {y, final_states, chunk_states, cell_states};
}

// out (head) or (head, headdim) = the sums of the cells added up.
void add_up_heads(const Tensor& partial, const Tensor& out, const Shape& p, cudaStream_t stream) {
  View<4> v;
  v.data = out.data_ptr();
  v.dtype = float_dtype("gradient", out);
  v.stride[2] = out.stride(0), v.stride[3] = out.dim() == 2 ? out.stride(1) : 0;
  add_up(partial.data_ptr(), p.compute, partial.size(0) * partial.size(1),
         {1, 1, p.heads, out.dim() == 2 ? p.headdim : 1}, v, stream);
}

// (task of the group, batch, seqlen, group, state) of partial sums, or of dB or dC themselves where
// a group has a single task.
View<5> parts_view(const Tensor& partial, const Tensor& out) {
  const Tensor& t = partial.numel() > 0 ? partial : out;
  View<5> v;
  v.data = t.data_ptr();
  v.dtype = float_dtype("gradient", t);
  const int64_t skip = t.dim() - 4;
  for (int64_t i = 0; i < 4; ++i) v.stride[i + 1] = t.stride(skip + i);
  if (skip == 1) v.stride[0] = t.stride(0);
  return v;
}

void add_up_tasks(const Tensor& partial, const Tensor& out, const Shape& p, cudaStream_t stream) {
  if (partial.numel() == 0) return;
  add_up(partial.data_ptr(), p.compute, partial.size(0), {p.batch, p.seqlen, p.groups, p.state},
         view<4>("gradient", out), stream);
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
  Call call;
  const OnDevice device(x);
  const cudaStream_t stream = device.stream;
  cuda::WalkParams back{};
  static_cast<cuda::Inputs&>(back) = inputs(in, call);
  check_ssd_gradients(in, back, dy, dlast, dchunk_states, cell_states, call.state_sizes);
  mark(in, back, stream, call);
  back.dy = view<4>("dy", dy);
  cuda::GradientParams p{};
  static_cast<cuda::Inputs&>(p) = back;

  const bool nothing = p.batch * p.heads * p.headdim * p.seqlen == 0;
  const ScalarType compute = scalar_type(p.compute);
  auto like = [&](const OptionalTensor& t) {
    if (!t) return empty(x, {0}, compute);
    return nothing ? zeros(*t, sizes_of(*t), t->scalar_type()) : empty_like(*t, t->scalar_type());
  };
  Tensor dx = like(x), ddt = like(dt), dA = like(A), dB = like(B), dC = like(C), dD = like(D);
  Tensor dz = like(z), ddt_bias = like(dt_bias), dlog_decay = like(log_decay);
  Tensor dh0 = like(h0);
  OptionalTensor dinitial;  // dh0, in the compute type
  if (h0) {
    const bool same = h0->scalar_type() == compute;
    dinitial = same ? dh0 : empty(x, call.state_sizes, compute);
    begin_states(dlast, *dinitial, p, stream);
    back.leave = ssd_slot_view("dinitial_states", *dinitial);
  }
  auto finish_states = [&] {
    if (!h0 || h0->scalar_type() == compute) return;
    copy_states(flat_states("dinitial_states", dinitial, p), flat_states("dinitial_states", dh0, p),
                p.slots(), p.heads * p.headdim, p.state, stream);
  };
  if (nothing) {
    finish_states();
    return {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dlog_decay, dh0};
  }

  back.backward = true;
  if (dlast) back.enter = ssd_slot_view("dfinal_states", *dlast);
  back.chunk_states = view<5>("dchunk_states", dchunk_states);
  Tensor dcells = empty(x, sizes_of(cell_states), cell_states.scalar_type());
  back.cell_states = dcells.data_ptr();
  walk(x, back, stream, call);
  finish_states();

  const OptionalTensor initial = in_compute("initial_states", h0, p, p.slots(), stream);
  if (initial) p.initial_state = ssd_slot_view("initial_states", *initial);
  p.dlast_state = back.enter;
  p.cell_states = cell_states.data_ptr(), p.dcell_states = dcells.data_ptr();
  p.heads_per_task = cuda::heads_of_task(p);
  p.dx = view<4>("dx", dx);
  p.ddt = log_decay ? view<3>("dlog_decay", dlog_decay) : view<3>("ddt", ddt);
  if (z) p.dz = view<4>("dz", dz);
  const int64_t tasks = p.tasks_per_group();
  const Sizes per_task = tasks == 1 ? Sizes{0} : Sizes{tasks, p.batch, p.seqlen, p.groups, p.state};
  Tensor dB_parts = empty(x, per_task, compute), dC_parts = empty(x, per_task, compute);
  Tensor dA_parts = empty(x, {p.batch, p.cells(), p.heads}, compute);
  Tensor dbias_parts = empty(x, {p.batch, p.cells(), p.heads}, compute);
  p.wide_D = D && D->dim() == 2;
  Tensor dD_parts = empty(x, {p.batch, p.cells(), p.heads, p.wide_D ? p.headdim : 1}, compute);
  p.dB = parts_view(dB_parts, dB), p.dC = parts_view(dC_parts, dC);
  p.dA = dA_parts.data_ptr(), p.ddt_bias = dbias_parts.data_ptr(), p.dD = dD_parts.data_ptr();
  const cuda::Room room = cuda::gradient_room(p);
  Tensor space = scratch(x, room, p.compute);
  if (!room.is_shared) p.scratch = space.data_ptr();
  cuda::gradients(p, stream);

  add_up_tasks(dB_parts, dB, p, stream), add_up_tasks(dC_parts, dC, p, stream);
  if (A) add_up_heads(dA_parts, dA, p, stream);
  if (D) add_up_heads(dD_parts, dD, p, stream);
  if (dt_bias) add_up_heads(dbias_parts, ddt_bias, p, stream);
  return {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dlog_decay, dh0};
}

}  // namespace

STATESCAN_CUDA_IMPL(m) {
  m.impl("ssd_scan_fwd", TORCH_BOX(&ssd_scan_fwd));
  m.impl("ssd_scan_bwd", TORCH_BOX(&ssd_scan_bwd));
}

}  // namespace statescan::bindings
