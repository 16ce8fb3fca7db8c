#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "bindings/runs.h"
#include "bindings/selective_scan.h"
#include "bindings/stream.h"
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
  OptionalTensor ends, marks, initial, carry, factor, kept[2];
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
  cuda::copy_states(slot_view(name, *t), flat_view(copy.data_ptr(), p), p.slots(), p.dim, p.state,
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
  cuda::copy_states(from ? flat_view(from->data_ptr(), p) : View<3>{}, flat_view(to, p), p.slots(),
                    p.dim, p.state, stream);
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

}  // namespace

STATESCAN_CUDA_IMPL(m) { m.impl("selective_scan_fwd", TORCH_BOX(&selective_scan_fwd)); }

}  // namespace statescan::bindings
