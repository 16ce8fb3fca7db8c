// Root-mean-square norm of a group of channels with a gate, for the CPU and the GPU. RMSNorm (Zhang &
// Sennrich 2019, eq. 4); the gate as in Mamba-2 (Dao & Gu 2024, section 7.1) before the norm, or after
// it. Over the n channels c of a group:
//
//   v = x silu(z)   (gate before the norm)     v = x   (after it, or no gate)
//   xhat = (v - mean) / sqrt(sum_c (v - mean)^2 / n + eps)
//   y = xhat weight + bias                     y = (xhat weight + bias) silu(z)
//
// where mean is 0, or that of v (a layer norm, Ba et al. 2016). With inputs added before all of it
// (a residual stream), x is their sum.
//
// A number is a float, or on the CPU a vector of channels. Include the device's mathematics
// (common/vector_math.h on the CPU) before this file.
#pragma once

#include "common/host_device.h"

namespace statescan::gated_rms_norm {

// Where silu(z) multiplies.
enum class Gate : int8_t { kNone, kBefore, kAfter };

// What the norm sees of a channel.
template <Gate kGate, class V>
STATESCAN_HOST_DEVICE V gated_input(V x, V z, V sigmoid_z) {
  return kGate == Gate::kBefore ? x * (z * sigmoid_z) : x;
}

// The gradient of the norm's output from that of y.
template <Gate kGate, class V>
STATESCAN_HOST_DEVICE V norm_output_vjp(V dy, V z, V sigmoid_z) {
  return kGate == Gate::kAfter ? dy * (z * sigmoid_z) : dy;
}

// The gradient of v, where dxhat is that of xhat. Through mean and root the whole group sees a channel:
// `mean_dxhat` is the mean of dxhat over the group (0 for a norm that subtracts no mean), `mean_dot`
// that of dxhat xhat.
template <class V, class R>
STATESCAN_HOST_DEVICE V norm_vjp(V dxhat, V xhat, R rstd, R mean_dxhat, R mean_dot) {
  return rstd * (dxhat - mean_dxhat - xhat * mean_dot);
}

// dx and dz of a channel, from the gradient dv of the norm's input and the norm's output n.
template <Gate kGate, class V>
STATESCAN_HOST_DEVICE void gate_vjp(V x, V z, V sigmoid_z, V n, V dy, V dv, V& dx, V& dz) {
  dx = kGate == Gate::kBefore ? dv * (z * sigmoid_z) : dv;
  if (kGate == Gate::kBefore) dz = dv * x * silu_slope(z, sigmoid_z);
  if (kGate == Gate::kAfter) dz = dy * n * silu_slope(z, sigmoid_z);
}

}  // namespace statescan::gated_rms_norm
