// The selective scan, one step of one channel d and one state n at a time, for the CPU and the GPU.
// Mamba (Gu & Dao 2023), eq. 2, with A discretized by zero-order hold and B by Euler's rule:
//
//   h_t = a_t h_{t-1} + b_t,   a_t = exp(delta_t A),   b_t = delta_t u_t B_t
//   y_t = sum_n C_t h_t + D u_t,   out_t = y_t silu(z_t)
//
// A number is a float, or on the CPU a vector of channels; B and C may be scalars shared by all of
// them. Include the device's mathematics (common/vector_math.h on the CPU) before this file.
#pragma once

#include "common/host_device.h"

namespace statescan::selective_scan {

// a_t, with A scaled by log2(e) once per scan, so that each step is a single power of two.
template <class V>
STATESCAN_HOST_DEVICE V decay(V delta, V A_log2e) {
  return exp2(delta * A_log2e);
}

template <class V, class S>
STATESCAN_HOST_DEVICE V next_state(V a, V h_prev, V delta_u, S B) {
  return a * h_prev + delta_u * B;
}

// The adjoint of one step. `dh` enters as the gradient of h_t from the steps after t and leaves as
// that of h_{t-1}. With g = dh_t = dh + C dy, the gradient of the loss with respect to
//   C_t is g's partner: dy h_t          B_t is g delta u
//   a_t is g h_{t-1}, so A gets g h_{t-1} a delta, and delta gets g h_{t-1} a A
//   delta u is sum_n g B_t
// Sums over n are added to; dB and dC are this channel's share, to be summed over the group.
template <class V, class SB, class SC>
STATESCAN_HOST_DEVICE void step_vjp(V a, V h_prev, V h, V delta, V delta_u, V A, SB B, SC C, V dy,
                                    V& dh, V& dA, V& dB, V& dC, V& d_delta, V& d_delta_u) {
  const V g = dh + dy * C;
  dC = dy * h;
  dB = g * delta_u;
  d_delta_u += g * B;
  dh = g * a;
  const V d_log_a = dh * h_prev;
  d_delta += d_log_a * A;
  dA += d_log_a * delta;
}

}  // namespace statescan::selective_scan
