// The short depthwise convolution of one channel, for the CPU and the GPU.
//
// A sequence x_0 .. x_{n-1} is thought of as padded, `left` inputs before it and `right` after,
// left + right = width - 1: p is the position in the padded sequence, that of x_t is t + left. Then
//
//   pre_t = bias + sum_k w_k x_{p = t + k},   y_t = act(pre_t),   k = 0 .. width - 1
//
// for every mode: causal has all of the padding on the left, anticausal (with mirrored taps) all of
// it on the right, "same" half on each side. The padding is the initial state, or zero.
//
// Backward, with dpre_t = dy_t act'(pre_t), which is zero outside of 0 .. n-1:
//
//   dx_p = sum_k w_k dpre_{p - k},   dw_k = sum_t dpre_t x_{p = t + k},   dbias = sum_t dpre_t
//
// A number is a float, or on the CPU a vector of channels or of time steps. Include the device's
// mathematics (common/vector_math.h on the CPU) before this file.
#pragma once

#include "common/host_device.h"

namespace statescan::causal_conv1d {

template <class V>
STATESCAN_HOST_DEVICE V activate(V pre, bool use_silu) {
  return use_silu ? silu(pre) : pre;
}

// The gradient of pre from that of y = activate(pre).
template <class V>
STATESCAN_HOST_DEVICE V activate_vjp(V pre, V dy, bool use_silu) {
  return use_silu ? dy * silu_slope(pre, sigmoid(pre)) : dy;
}

}  // namespace statescan::causal_conv1d
