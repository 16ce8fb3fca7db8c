// The problem of the selective scan along routes, for the CPU and the GPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/view.h"

namespace statescan::selective_scan_2d {

// Places in a tile of 16 channels are counted in 32 bits.
inline constexpr int64_t kMaxTokens = (int64_t(1) << 27) - 1;

// A task of a kernel is a batch element (or a group of them) times some channels, along all routes:
// it alone adds to the outputs of its tokens and channels. Tasks follow from the shape alone, never
// from the number of threads or the instruction set, and so does every bit of the result.
//
// Where a route axis has stride 0, the routes share the operand.
struct Problem {
  int64_t batch, routes, dim, tokens, steps, state;
  int64_t rank;          // of delta = dt_weight delta_low; 0: delta is given whole
  int64_t delta_repeat;  // neighbouring channels that share a row of delta
  int64_t chunk;         // steps between two saved states
  int64_t reset_period;  // the state starts anew every so many steps; 0: never
  bool carry;            // the state flows from the end of a route into the next one
  bool delta_softplus;
  bool u_per_route, y_per_route;  // else one for all routes
  bool delta_shared;              // one row of step sizes for all routes
  DType compute;                  // kFloat32 or kFloat64

  const void* index;   // (batch, route, step): the token of a step; -1 ghost, -2 skip
  bool index_is_wide;  // int64 instead of int32
  int64_t index_stride[3];

  View<4> u;                       // (batch, route, dim, token)
  View<4> delta;                   // (batch, route, dim / delta_repeat or rank, step)
  View<4> B, C;                    // (batch, route, state, step)
  View<3> A;                       // (route, dim, state)
  View<3> dt_weight;               // (route, dim, rank)
  View<2> D, delta_bias, weights;  // (route, dim), (route, dim / delta_repeat), (route, dim)
  View<3> z;                       // (batch, dim, token)
  View<4> initial_state;           // (batch, route, dim, state); with carry of route 0 only

  STATESCAN_HOST_DEVICE int64_t chunks() const { return (steps + chunk - 1) / chunk; }
  STATESCAN_HOST_DEVICE bool resets_at(int64_t t) const {
    return reset_period > 0 && t > 0 && t % reset_period == 0;
  }
};

}  // namespace statescan::selective_scan_2d
