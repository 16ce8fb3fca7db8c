// Parameters and entry points of the CPU kernels of the selective scan along routes.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/isa.h"
#include "common/view.h"

namespace statescan::selective_scan_2d {

// Steps of a route that are walked at once: what they need stays in the first-level cache.
inline constexpr int kMaxChunk = 128;
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
  int64_t chunk;         // steps between two saved states, at most kMaxChunk
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

struct FwdParams : Problem {
  View<4> y;           // (batch, route or 1, dim, token)
  View<4> last_state;  // (batch, route, dim, state); with carry of the last route only
  void* chunk_states;  // (batch, route, chunk, state, dim) in the compute type, or null

  static constexpr int64_t kTaskChannels = 16;
  STATESCAN_HOST_DEVICE int64_t channel_tasks() const {
    return (dim + kTaskChannels - 1) / kTaskChannels;
  }
  int64_t tasks() const { return batch * channel_tasks(); }
  int64_t scratch_bytes() const;
};

struct BwdParams : Problem {
  const void* chunk_states;
  View<4> dy;           // (batch, route or 1, dim, token), absent: zero
  View<4> dlast_state;  // as last_state, or absent

  View<4> du;              // (batch, route or 1, dim, token)
  View<4> ddelta;          // (batch, route or 1, dim, step), not yet summed over delta_repeat
  View<3> dz;              // (batch, dim, token)
  View<4> dinitial_state;  // as initial_state, or absent
  // Partial sums, in the compute type, for common/sum_partials.h to add up in order. All of them
  // have a route axis, whether or not the routes share the operand.
  void *dB, *dC;                      // (task of a batch element, route, batch, step, state)
  void* ddt;                          // (task of a batch element, route, batch, rank, step)
  void* dA;                           // (row group, route, dim, state)
  void* ddt_weight;                   // (row group, route, dim, rank)
  void *dD, *ddelta_bias, *dweights;  // (row group, route, dim)

  // Batch elements are dealt to at most 32 groups, which bounds the partial sums over the batch.
  STATESCAN_HOST_DEVICE int64_t row_groups() const { return batch < 32 ? batch : 32; }
  // About 64 channels to a task, and at most 16 tasks, bound the partial sums over the channels.
  STATESCAN_HOST_DEVICE int64_t channel_tasks() const {
    const int64_t wanted = (dim + 63) / 64;
    return wanted < 16 ? wanted : 16;
  }
  // Whole vectors of the widest kind, dealt evenly.
  STATESCAN_HOST_DEVICE int64_t first_channel(int64_t part) const {
    const int64_t vectors = (dim + 15) / 16, first = vectors * part / channel_tasks() * 16;
    return first < dim ? first : dim;
  }
  int64_t tasks() const { return row_groups() * channel_tasks(); }
  int64_t scratch_bytes() const;
};

STATESCAN_CPU_KERNEL(fwd, FwdParams)
STATESCAN_CPU_KERNEL(bwd, BwdParams)

}  // namespace statescan::selective_scan_2d
