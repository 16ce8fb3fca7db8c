// Parameters and entry points of the selective scan's CPU kernels.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/isa.h"
#include "common/segments.h"
#include "common/view.h"
#include "selective_scan/shape.h"

namespace statescan::selective_scan {

// A task of a kernel is a row (or a group of rows) times some channels of one group, which share
// that group's B and C. Tasks follow from the shape alone, never from the number of threads or
// the instruction set, and so do the order of every sum and with it every bit of the result.
struct Problem : Shape {
  const Segments* segments;

  // 64 channels amortize the conversion of B and C; at most 16 tasks a group bound the partial sums.
  STATESCAN_HOST_DEVICE int64_t task_channels() const {
    return group_dim() <= 1024 ? 64 : (group_dim() + 1023) / 1024 * 64;
  }
  STATESCAN_HOST_DEVICE int64_t tasks_per_group() const {
    return (group_dim() + task_channels() - 1) / task_channels();
  }
  STATESCAN_HOST_DEVICE int64_t channel_tasks() const { return groups * tasks_per_group(); }
};

struct FwdParams : Problem {
  View<3> u, delta, z;    // (batch, dim, seqlen); delta (batch, dim / delta_repeat, seqlen)
  View<2> A;              // (dim, state)
  View<4> B, C;           // (batch, group, state, seqlen); constant: strides (0, dim, state, 0)
  View<1> D, delta_bias;  // (dim), (dim / delta_repeat)
  View<3> initial_state;  // (slot, dim, state)
  View<3> y;              // (batch, dim, seqlen)
  View<3> last_state;     // (slot, dim, state)
  View<4> states;         // (batch, seqlen, dim, state), or absent
  void* chunk_states;     // (batch, chunks, state, dim) in the compute type, or null

  int64_t tasks() const { return segments->rows() * channel_tasks(); }
  int64_t scratch_bytes() const;
};

struct BwdParams : Problem {
  View<3> u, delta, z;
  View<2> A;
  View<4> B, C;
  View<1> D, delta_bias;
  View<3> initial_state;
  const void* chunk_states;
  View<3> dy;           // (batch, dim, seqlen), gradient of the gated output; absent: zero
  View<3> dlast_state;  // (slot, dim, state), or absent
  View<4> dstates;      // (batch, seqlen, dim, state), or absent

  View<3> du, dz;          // (batch, dim, seqlen)
  View<3> ddelta;          // (batch, dim, seqlen), not yet summed over delta_repeat
  View<3> dinitial_state;  // (slot, dim, state), or absent
  // Partial sums, in the compute type, for common/sum_partials.h to add up in order.
  void* dA;  // (row group, dim, state)
  void* dB;  // (task of the group, batch, group, seqlen, state); constant: like dA
  void* dC;
  void* dD;           // (row group, dim)
  void* ddelta_bias;  // (row group, dim)

  // Rows are dealt to at most 32 groups, which bounds the partial sums over the batch.
  STATESCAN_HOST_DEVICE int64_t row_groups() const {
    return segments->rows() < 32 ? segments->rows() : 32;
  }
  int64_t tasks() const { return row_groups() * channel_tasks(); }
  int64_t scratch_bytes() const;
};

STATESCAN_CPU_KERNEL(fwd, FwdParams)
STATESCAN_CPU_KERNEL(bwd, BwdParams)

}  // namespace statescan::selective_scan
