// Every operator of the library, its schema and nothing else. Sizes and meaning: the docstrings in
// python/statescan/ops/. Kernels are registered beside their bindings, gradients and fakes in Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(statescan, m) {
  // -> y, last_state, states, chunk_states; what was not asked for is empty
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, "
      "bool delta_softplus, bool reverse, ScalarType? out_dtype, int chunk, bool return_states, "
      "bool save_chunk_states) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state
  m.def(
      "selective_scan_bwd(Tensor? dy, Tensor? dlast_state, Tensor? dstates, Tensor u, Tensor "
      "delta, "
      "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, Tensor chunk_states, "
      "bool delta_softplus, bool reverse, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  // The selective scan along routes. -> y, last_state, chunk_states (empty if not asked for)
  m.def(
      "selective_scan_2d_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? dt_weight, Tensor? weights, Tensor? initial_state, "
      "Tensor index, int reset_period, bool carry, bool delta_softplus, bool merge, "
      "ScalarType? out_dtype, int chunk, bool save_chunk_states) -> (Tensor, Tensor, Tensor)");
  // -> du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, ddt_weight, dweights, dinitial_state; empty
  // where there is no such argument
  m.def(
      "selective_scan_2d_bwd(Tensor? dy, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, "
      "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? dt_weight, "
      "Tensor? weights, Tensor? initial_state, Tensor index, Tensor chunk_states, "
      "int reset_period, bool carry, bool delta_softplus, bool merge, int chunk) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // -> y, final_states, chunk_states, cell_states; what was not asked for is empty
  m.def(
      "ssd_scan_fwd(Tensor x, Tensor? dt, Tensor? A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, Tensor? log_decay, Tensor? initial_states, Tensor? seq_idx, "
      "Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max, bool reverse, "
      "bool shift_output, int chunk, ScalarType? out_dtype, bool return_final_states, "
      "bool return_chunk_states, bool save_cell_states) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dlog_decay, dinitial_states; empty where there is no
  // such argument
  m.def(
      "ssd_scan_bwd(Tensor? dy, Tensor? dfinal_states, Tensor? dchunk_states, Tensor x, "
      "Tensor? dt, Tensor? A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
      "Tensor? log_decay, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, "
      "Tensor cell_states, bool dt_softplus, float dt_min, float dt_max, bool reverse, "
      "bool shift_output, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  // -> y, empty without compute_output
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus, "
      "float dt_min, float dt_max, bool compute_output, ScalarType? out_dtype) -> Tensor");
  // -> y (batch, [tokens,] inner); both states are changed in place
  m.def(
      "mamba2_step(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor conv_weight, "
      "Tensor? conv_bias, Tensor? dt_bias, Tensor A, Tensor? D, Tensor? norm_weight, "
      "float norm_eps, bool norm_before_gate, int? norm_group_size, bool silu, bool dt_softplus, "
      "float dt_min, float dt_max, Tensor? cache_seqlens, Tensor? state_batch_indices) -> Tensor");
  // -> y, final_state (empty if not asked for)
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? seq_idx, Tensor? cu_seqlens, bool silu, str mode, ScalarType? out_dtype, "
      "bool return_final_state) -> (Tensor, Tensor)");
  // -> dx, dweight, dbias, dinitial_state; empty where there is no such argument
  m.def(
      "causal_conv1d_bwd(Tensor? dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, bool silu, str mode) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // -> y; conv_state is changed in place
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
      "bool silu, Tensor? cache_seqlens, Tensor? conv_state_indices) -> Tensor");
  m.def("causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, int state_len) -> Tensor");
  // -> y, residual_out (empty if not asked for)
  m.def(
      "gated_rms_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? z, Tensor? residual, "
      "float eps, int group_size, bool norm_before_gate, bool subtract_mean, "
      "ScalarType? out_dtype, ScalarType? residual_dtype, bool return_residual) -> "
      "(Tensor, Tensor)");
  // -> dx, dweight, dbias, dz, dresidual; empty where there is no such argument. dresidual is dx in
  // another type, and empty if none is given
  m.def(
      "gated_rms_norm_bwd(Tensor? dy, Tensor? dresidual_out, Tensor x, Tensor? weight, "
      "Tensor? bias, Tensor? z, Tensor? residual, float eps, int group_size, "
      "bool norm_before_gate, bool subtract_mean, ScalarType dx_dtype, "
      "ScalarType? dresidual_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // x (batch, count or 1, dim, H * W) -> (batch, count, dim, H * W), or (batch, H * W, count, dim)
  m.def("cross_scan(Tensor x, SymInt H, SymInt W, str mode, bool channel_last) -> Tensor");
  // y (batch, count, dim, H * W) -> (batch, dim, H * W), or (batch, H * W, dim)
  m.def(
      "cross_merge(Tensor y, SymInt H, SymInt W, str mode, str reduce, bool channel_last, "
      "ScalarType? out_dtype) -> Tensor");
  // x (batch, count or 1, dim, length) -> (batch, count, dim, steps), or (batch, steps, count, dim)
  m.def("route_gather(Tensor x, Tensor? index, int[] digits, bool channel_last) -> Tensor");
  // y (batch, count, dim, steps) -> (batch, dim, length), or (batch, length, dim)
  m.def(
      "route_scatter(Tensor y, Tensor? index, int[] digits, SymInt length, str reduce, "
      "bool channel_last, ScalarType? out_dtype) -> Tensor");
}
