// State-space duality, one step of one head at a time, for the CPU and the GPU. Mamba-2 (Dao & Gu
// 2024), eq. 2 with A a number for each head, discretized as in its listing 1:
//
//   S_t = a_t S_{t-1} + w_t B_t x_t^T      S: (state, headdim);  a_t = exp(l_t)
//   y_t = S_t^T C_t + D x_t,   out_t = y_t silu(z_t)
//
// where l_t = dt_t A and w_t = dt_t, or l_t is given (log_decay) and w_t = 1. A number is a float,
// or on the CPU a vector. Include the device's mathematics (common/vector_math.h) before this file.
#pragma once

#include "common/host_device.h"

namespace statescan::ssd_scan {

inline constexpr double kLog2e = 1.4426950408889634;

// log2 of a decay is held within these bounds, so that a sum of a tile's is finite and a difference
// of sums never infinity minus infinity: 2^-20000 is 0 in any type.
inline constexpr double kLog2Bound = 20000;

// The step size from what is given as dt. `low` and `high` bound it (dt_limit).
template <class V, class R>
STATESCAN_HOST_DEVICE V step_size(V dt, R bias, bool apply_softplus, R low, R high) {
  V w = dt + bias;
  if (apply_softplus) w = softplus(w);
  w = w < low ? low - V{} : w;
  return w > high ? high - V{} : w;
}

// The same, and its derivative: 0 where it is held at a bound.
template <class V, class R>
STATESCAN_HOST_DEVICE V step_size(V dt, R bias, bool apply_softplus, R low, R high, V& slope) {
  V w = dt + bias;
  slope = 1 - V{};
  if (apply_softplus) w = softplus(w, slope);
  slope = w < low ? V{} : slope;
  slope = w > high ? V{} : slope;
  w = w < low ? low - V{} : w;
  return w > high ? high - V{} : w;
}

}  // namespace statescan::ssd_scan
