// Parameters and entry points of the CPU kernels of the selective scan along routes.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "selective_scan_2d/shape.h"

namespace statescan::selective_scan_2d {

// Steps of a route that are walked at once: what they need stays in the first-level cache.
inline constexpr int kMaxChunk = 128;
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
