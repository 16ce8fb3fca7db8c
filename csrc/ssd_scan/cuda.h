// Parameters and launchers of the SSD scan's CUDA kernels.
//
// The scan is cut into cells (Shape::cell() steps on a fixed grid, at most 64), and a cell into
// pieces where sequences start (pieces.cuh). Three kinds of kernel do all the work:
//
//   walk       along a sequence, cell by cell with the state S on chip: outputs, states
//   walk back  the same code along the other way, with the gradient dS of the state
//   gradients  every cell for itself, from S before it and dS after it
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/runs.cuh"
#include "common/view.h"
#include "ssd_scan/shape.h"

namespace statescan::ssd_scan::cuda {

// Largest state of the kernels that multiply bfloat16 numbers on tensor cores.
inline constexpr int64_t kMostStates = 256;

struct Inputs : Shape {
  View<4> x, z;        // (batch, seqlen, head, headdim)
  View<3> dt;          // (batch, seqlen, head), or the log decay
  View<1> A, dt_bias;  // (head), or absent
  View<4> B, C;        // (batch, seqlen, group, state)
  View<2> D;           // (head, headdim), the latter with stride 0 if the same for all
  View<4> dy;          // backward: (batch, seqlen, head, headdim); absent: zero

  Sequences sequences;    // with ends where there is seq_idx and no state for each id
  int64_t slots_per_row;  // states of a batch element with seq_idx; 0: one, for its two ends
  const int32_t* marks;   // (batch, seqlen): Mark, or null: every batch element is one sequence

  int64_t shared_bytes;  // that a block may have on this device
  int64_t processors;    // of this device
  bool hopper;           // the device is one, and its own kernels are wanted

  // Terms of bfloat16 that hold x, B and C as factors on tensor cores; 0: none do (common/mma.cuh).
  int terms() const {
    if (compute != DType::kFloat32 || state > kMostStates) return 0;
    int most = 1;
    for (DType t : {x.dtype, B.dtype, C.dtype}) {
      const int own = t == DType::kFloat32 ? 3 : t == DType::kFloat16 ? 2 : 1;
      most = own > most ? own : most;
    }
    return most;
  }

  int64_t slots() const { return slots_per_row > 0 ? batch * slots_per_row : sequences.slots(); }
};

// A walk, forward with S or backward with dS. It starts each sequence from `enter` and leaves what
// it ends with in `leave`, both (slot, head, headdim, state) or absent. With bfloat16 products
// states and their gradients are float, but for the saved ones.
struct WalkParams : Inputs {
  bool backward;
  bool summarize;  // nothing but the end of each part but the last, into carry and factor
  View<4> enter, leave;
  View<4> y;  // forward: (batch, seqlen, head, headdim)
  View<5>
      chunk_states;   // (batch, chunk, head, headdim, state): written, backward: added; or absent
  void* cell_states;  // (batch, cell, head, state, headdim) of cell_dtype: S before the cell, dS
                      // after it; or null
  int64_t parts;      // of a sequence, walked at the same time
  void *carry, *factor;  // (part, batch, head, state, headdim), (part, batch, head) in the compute
                         // type: what enters a part; null if parts == 1
  void* scratch;         // Room::elements for each block, or null: in shared memory
};

struct GradientParams : Inputs {
  View<4> initial_state, dlast_state;      // (slot, head, headdim, state), or absent
  const void *cell_states, *dcell_states;  // (batch, cell, head, state, headdim) of cell_dtype
  int64_t heads_per_task;                  // of one group

  View<4> dx, dz;  // (batch, seqlen, head, headdim)
  View<3> ddt;     // (batch, seqlen, head)
  View<5> dB, dC;  // (task of the group, batch, seqlen, group, state)
  // Sums over a cell, in the compute type, to be added up in order.
  void *dA, *ddt_bias;  // (batch, cell, head)
  void* dD;             // (batch, cell, head, headdim), or (batch, cell, head) unless wide_D
  bool wide_D;
  void* scratch;

  STATESCAN_HOST_DEVICE int64_t tasks_per_group() const {
    return (group_heads() + heads_per_task - 1) / heads_per_task;
  }
};

// What the blocks of a launch work in: in shared memory if it fits, else so much for each block.
struct Room {
  int64_t elements, blocks;
  bool is_shared;
};
Room walk_room(const WalkParams& p);
Room gradient_room(const GradientParams& p);

// Parts that the sequences should be cut into, so that all processors have work.
int64_t parts_of(const Shape& p);
// Heads of one group that a block of the gradients takes, one after the other.
int64_t heads_of_task(const Shape& p);

// Fills carry if there are several parts, then walks.
void walk(const WalkParams& p, cudaStream_t stream);
void gradients(const GradientParams& p, cudaStream_t stream);

}  // namespace statescan::ssd_scan::cuda
