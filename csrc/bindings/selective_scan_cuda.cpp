#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "bindings/runs.h"
#include "bindings/selective_scan.h"
#include "bindings/stream.h"
#include "common/arrays.cuh"
#include "selective_scan/cuda.h"

namespace statescan::bindings {
namespace {

using namespace selective_scan;  // Shape, cuda::FwdParams, ...

// (slot, dim, state) of a tensor of states that may have an axis of sequences before it.
View<3> slot_view(const char* name, const Tensor& t) {
  View<3> v;
  v.data = t.data_ptr();
  v.dtype = float_dtype(name, t);
  const int64_t last = t.dim() - 1;
  v.stride[0] = t.stride(last - 2), v.stride[1] = t.stride(last - 1), v.stride[2] = t.stride(last);
  return v;
}

View<3> flat_view(void* data, const Shape& p) {
  return {data, p.compute, {p.dim * p.state, p.state, 1}};
}

// Everything of a call but its results, with the memory that the kernels work in.
struct Call {
  cuda::Plan plan;
  OptionalTensor ends, marks, initial, carry, factor, kept[4];
  Sizes state_sizes;  // (batch, sequence, dim, state) or (slot, dim, state)
};

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

// States in the compute type, as the kernels want them: a copy where they are not so already.
OptionalTensor flat_states(const char* name, const OptionalTensor& t, const cuda::Inputs& p,
                           cudaStream_t stream) {
  if (!t) return t;
  if (float_dtype(name, *t) == p.compute) return t;
  Tensor copy = empty(*t, {p.slots(), p.dim, p.state}, scalar_type(p.compute));
  copy_states(slot_view(name, *t), flat_view(copy.data_ptr(), p), p.slots(), p.dim, p.state,
              stream);
  return copy;
}

void find_sequences(const ScanOperands& x, cuda::Inputs& p, Call& call) {
  const bool by_id = x.seq_idx && x.initial_state && x.initial_state->dim() == 4;
  DeviceSequences found = device_sequences(x.u, p.batch, p.seqlen, x.seq_idx, x.cu_seqlens, !by_id);
  p.sequences = found.sequences;
  call.ends = found.ends;
  if (by_id) {
    p.slots_per_row = x.initial_state->size(1);
    check_shape("initial_state", *x.initial_state, "(batch, sequence, dim, state)",
                {p.batch, p.slots_per_row, p.dim, p.state});
    call.state_sizes = {p.batch, p.slots_per_row, p.dim, p.state};
  } else {
    call.state_sizes = {p.sequences.slots(), p.dim, p.state};
    if (x.initial_state) {
      check_shape("initial_state", *x.initial_state,
                  x.cu_seqlens ? "(sequence, dim, state)" : "(batch, dim, state)",
                  call.state_sizes);
    }
  }
}

// Fills p and allocates; `kept`: how many Inputs::kept there are.
void prepare(const ScanOperands& x, bool all_states, int kept, cudaStream_t stream, cuda::Inputs& p,
             Call& call) {
  call.plan = cuda::plan(p, all_states);
  const ScalarType compute = scalar_type(p.compute);
  p.parts = call.plan.parts;
  p.over[cuda::kU] = view<3>("u", x.u);
  p.over[cuda::kDelta] = view<3>("delta", x.delta);
  p.over[cuda::kZ] = view<3>("z", x.z);
  p.A = view<2>("A", x.A);
  p.projection[0] = projection_view("B", x.B);
  p.projection[1] = projection_view("C", x.C);
  p.D = view<1>("D", x.D);
  p.delta_bias = view<1>("delta_bias", x.delta_bias);
  call.initial = flat_states("initial_state", contiguous(x.initial_state), p, stream);
  if (call.initial) p.initial = call.initial->data_ptr();
  if (x.cu_seqlens || x.seq_idx) {
    call.marks = empty(x.u, {p.batch, p.seqlen}, ScalarType::Int);
    p.marks = static_cast<int32_t*>(call.marks->data_ptr());
  }
  if (p.parts > 1) {
    const Sizes sizes{p.parts, p.batch, p.state, p.dim};
    call.carry = empty(x.u, sizes, compute), call.factor = empty(x.u, sizes, compute);
    p.carry = call.carry->data_ptr(), p.factor = call.factor->data_ptr();
  }
  for (int i = 0; i < kept; ++i) {
    call.kept[i] = empty(x.u, {call.plan.kept}, compute);
    p.kept[i] = call.kept[i]->data_ptr();
  }
}

void check_chunk(const Shape& p) {
  if (p.chunk == cuda::kSteps) return;
  fail("chunk must be " + std::to_string(cuda::kSteps) + " on a GPU, got " +
       std::to_string(p.chunk));
}

// Where sequences may have no tokens, their last state is their first one.
void begin_states(const OptionalTensor& from, const cuda::Inputs& p, void* to,
                  cudaStream_t stream) {
  if (p.marks == nullptr && p.seqlen > 0) return;
  copy_states(from ? flat_view(from->data_ptr(), p) : View<3>{}, flat_view(to, p), p.slots(), p.dim,
              p.state, stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_scan_fwd(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
    const OptionalTensor& cu_seqlens, bool delta_softplus, bool reverse,
    std::optional<ScalarType> out_dtype, int64_t chunk, bool return_states,
    bool save_chunk_states) {
  const ScanOperands x{u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens};
  cuda::FwdParams p{};
  static_cast<Shape&>(p) = check_scan(x, delta_softplus, reverse, chunk);
  Call call;
  find_sequences(x, p, call);
  const OnDevice device(u);
  prepare(x, return_states, 1, device.stream, p, call);

  const ScalarType compute = scalar_type(p.compute);
  Tensor y = empty_like(u, out_dtype ? *out_dtype : u.scalar_type());
  Tensor last_state = empty(u, call.state_sizes, compute);
  Tensor states =
      empty(u, return_states ? Sizes{p.batch, p.seqlen, p.dim, p.state} : Sizes{0}, compute);
  Tensor chunk_states =
      empty(u, save_chunk_states ? Sizes{p.batch, p.chunks(), p.state, p.dim} : Sizes{0}, compute);
  p.y = view<3>("out_dtype", y);
  p.last = last_state.data_ptr();
  if (return_states) p.states = states.data_ptr();
  if (save_chunk_states) {
    check_chunk(p);
    p.chunk_states = chunk_states.data_ptr();
  }
  begin_states(call.initial, p, p.last, device.stream);
  cuda::fwd(p, call.plan.layout, device.stream);
  return {y, last_state, states, chunk_states};
}

// A gradient that is summed over parts and batch: (dim) or (dim, state).
void add_up_rows(const Tensor& partial, const Tensor& out, const cuda::Inputs& p,
                 cudaStream_t stream) {
  const int64_t state = out.dim() == 2 ? p.state : 1;
  View<4> v;
  v.data = out.data_ptr();
  v.dtype = float_dtype("gradient", out);
  v.stride[2] = out.stride(0), v.stride[3] = out.dim() == 2 ? out.stride(1) : 0;
  add_up(partial.data_ptr(), p.compute, partial.size(0), {1, 1, p.dim, state}, v, stream);
}

// dB or dC that varies in time, summed over blocks of channels.
void add_up_blocks(const Tensor& partial, const Tensor& out, const cuda::Inputs& p,
                   cudaStream_t stream) {
  View<4> v = projection_view("gradient", out);  // (batch, group, state, seqlen)
  std::swap(v.stride[2], v.stride[3]);
  add_up(partial.data_ptr(), p.compute, partial.size(0), {p.batch, p.groups, p.seqlen, p.state}, v,
         stream);
}

void check_gradients(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                     const OptionalTensor& dstates, const Tensor& chunk_states,
                     const ScanOperands& x, const Sizes& state_sizes, const Shape& p) {
  check_shape("chunk_states", chunk_states, "(batch, chunk, state, dim)",
              {p.batch, p.chunks(), p.state, p.dim});
  check_same_device("chunk_states", chunk_states, x.u);
  for (const auto& [name, t] :
       {std::pair{"dy", &dy}, {"dlast_state", &dlast_state}, {"dstates", &dstates}}) {
    if (*t) check_same_device(name, **t, x.u), check_no_wider(name, **t, p.compute);
  }
  if (dy) check_shape("dy", *dy, "(batch, dim, seqlen)", {p.batch, p.dim, p.seqlen});
  if (dlast_state) check_shape("dlast_state", *dlast_state, "of last_state", state_sizes);
  if (dstates) {
    check_shape("dstates", *dstates, "(batch, seqlen, dim, state)",
                {p.batch, p.seqlen, p.dim, p.state});
  }
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
  const ScanOperands x{u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens};
  cuda::BwdParams p{};
  static_cast<Shape&>(p) = check_scan(x, delta_softplus, reverse, chunk);
  check_chunk(p);
  Call call;
  find_sequences(x, p, call);
  check_gradients(dy, dlast_state, dstates, chunk_states, x, call.state_sizes, p);
  const OnDevice device(u);
  const bool any = dstates || p.constant_B || p.constant_C || p.compute == DType::kFloat64;
  prepare(x, dstates.has_value(), any ? 4 : 2, device.stream, p, call);
  const OptionalTensor dlast =
      flat_states("dlast_state", contiguous(dlast_state), p, device.stream);
  if (dlast) p.dlast = dlast->data_ptr();
  p.chunk_states = chunk_states.data_ptr();
  p.over[cuda::kDy] = view<3>("dy", dy);
  p.dstates = view<4>("dstates", dstates);

  const ScalarType compute = scalar_type(p.compute);
  auto like = [&](const OptionalTensor& t) {
    return t ? empty_like(*t, t->scalar_type()) : empty(u, {0}, compute);
  };
  Tensor du = like(u), dA = like(A), dB = like(B), dC = like(C), dD = like(D), dz = like(z);
  // With rows of delta for several channels, Python sums ddelta and ddelta_bias over these.
  const bool grouped = p.delta_repeat != 1;
  Tensor ddelta = grouped ? empty(u, {p.batch, p.dim, p.seqlen}, compute) : like(delta);
  Tensor dbias = grouped && delta_bias ? empty(u, {p.dim}, compute) : like(delta_bias);
  p.gradient[1] = view<3>("du", du);
  p.gradient[0] = view<3>("ddelta", ddelta);
  if (z) p.gradient[2] = view<3>("dz", dz);
  OptionalTensor dh0, dinitial;
  if (initial_state) {
    dh0 = empty(u, call.state_sizes, initial_state->scalar_type());
    dinitial = initial_state->scalar_type() == compute ? *dh0 : empty(u, call.state_sizes, compute);
    p.dinitial = dinitial->data_ptr();
    begin_states(dlast, p, p.dinitial, device.stream);
  }

  // Without a task (no batch, no channels, no steps) nothing writes the sums: the gradients are zero.
  const bool nothing = p.batch * p.dim * p.seqlen == 0;
  auto partial = [&](const Sizes& sizes) {
    return nothing ? zeros(u, sizes, compute) : empty(u, sizes, compute);
  };
  const int64_t rows = p.parts * p.batch;
  const Sizes per_row{rows, p.dim, p.state};
  const Sizes per_block{call.plan.channel_blocks, p.batch, p.groups, p.seqlen, p.state};
  Tensor dA_sums = partial(per_row), dD_sums = partial({rows, p.dim});
  Tensor dB_sums = partial(p.constant_B ? per_row : per_block);
  Tensor dC_sums = partial(p.constant_C ? per_row : per_block);
  Tensor dbias_sums = partial({rows, p.dim});
  p.dA = dA_sums.data_ptr(), p.dD = dD_sums.data_ptr(), p.dbias = dbias_sums.data_ptr();
  p.sums[0] = dB_sums.data_ptr(), p.sums[1] = dC_sums.data_ptr();

  cuda::bwd(p, call.plan.layout, device.stream);

  const cudaStream_t s = device.stream;
  add_up_rows(dA_sums, dA, p, s);
  p.constant_B ? add_up_rows(dB_sums, dB, p, s) : add_up_blocks(dB_sums, dB, p, s);
  p.constant_C ? add_up_rows(dC_sums, dC, p, s) : add_up_blocks(dC_sums, dC, p, s);
  if (D) add_up_rows(dD_sums, dD, p, s);
  if (delta_bias) add_up_rows(dbias_sums, dbias, p, s);
  if (dh0 && float_dtype("dinitial_state", *dh0) != p.compute) {
    copy_states(flat_view(dinitial->data_ptr(), p), slot_view("dinitial_state", *dh0), p.slots(),
                p.dim, p.state, s);
  }
  return {du, ddelta, dA, dB, dC, dD, dz, dbias, dh0 ? *dh0 : empty(u, {0}, compute)};
}

}  // namespace

STATESCAN_CUDA_IMPL(m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&selective_scan_bwd));
}

}  // namespace statescan::bindings
