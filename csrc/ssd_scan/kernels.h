// Parameters and entry points of the SSD scan's CPU kernels.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/isa.h"
#include "common/segments.h"
#include "common/view.h"
#include "ssd_scan/shape.h"

namespace statescan::ssd_scan {

// A task of a kernel is a row (or a group of rows) times some heads of one group, which share that
// group's B, C and C B^T.
struct Problem : Shape {
  int64_t heads_per_task;  // at most; of one group
  const Segments* segments;

  STATESCAN_HOST_DEVICE int64_t tasks_per_group() const {
    return (group_heads() + heads_per_task - 1) / heads_per_task;
  }
  STATESCAN_HOST_DEVICE int64_t head_tasks() const { return groups * tasks_per_group(); }
};

struct FwdParams : Problem {
  View<4> x, z;           // (batch, seqlen, head, headdim)
  View<3> dt;             // (batch, seqlen, head), or the log decay
  View<1> A, dt_bias;     // (head), or absent
  View<4> B, C;           // (batch, seqlen, group, state)
  View<2> D;              // (head, headdim), the latter with stride 0 if the same for all
  View<4> initial_state;  // (slot, head, headdim, state)
  View<4> y;              // (batch, seqlen, head, headdim)
  View<4> last_state;     // (slot, head, headdim, state), or absent
  View<5> chunk_states;   // (batch, chunk, head, headdim, state), or absent
  void* cell_states;      // (batch, cell, head, state, headdim) of cell_dtype, or null

  int64_t tasks() const { return segments->rows() * head_tasks(); }
  int64_t scratch_bytes() const;
};

struct BwdParams : Problem {
  View<4> x, z;
  View<3> dt;
  View<1> A, dt_bias;
  View<4> B, C;
  View<2> D;
  View<4> initial_state;
  const void* cell_states;
  View<4> dy;             // (batch, seqlen, head, headdim), of the gated output; absent: zero
  View<4> dlast_state;    // (slot, head, headdim, state), or absent
  View<5> dchunk_states;  // (batch, chunk, head, headdim, state), or absent

  View<4> dx, dz;          // (batch, seqlen, head, headdim)
  View<3> ddt;             // (batch, seqlen, head)
  View<4> dinitial_state;  // (slot, head, headdim, state), or absent
  View<5> dB, dC;          // (task of the group, batch, seqlen, group, state)
  // Partial sums, in the compute type, for common/sum_partials.h to add up in order.
  void* dA;        // (row group, head)
  void* ddt_bias;  // (row group, head)
  void* dD;        // (row group, head, headdim), or (row group, head) unless wide_D
  bool wide_D;

  // Rows are dealt to at most 32 groups, which bounds the partial sums over the batch.
  STATESCAN_HOST_DEVICE int64_t row_groups() const {
    return segments->rows() < 32 ? segments->rows() : 32;
  }
  int64_t tasks() const { return row_groups() * head_tasks(); }
  int64_t scratch_bytes() const;
};

STATESCAN_CPU_KERNEL_BF16(fwd, FwdParams)
STATESCAN_CPU_KERNEL_BF16(bwd, BwdParams)

}  // namespace statescan::ssd_scan
