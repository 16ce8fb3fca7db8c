// Parameters and launchers of the selective scan's CUDA kernels.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/runs.cuh"
#include "common/view.h"
#include "selective_scan/shape.h"

namespace statescan::selective_scan::cuda {

// Steps of a tile. The backward has no other states than those that the forward saved, so it is
// also the chunk, the steps between two saved states.
inline constexpr int kSteps = 16;

// Which tensor of (batch, dim, seqlen) is meant. z and dy may be absent.
enum Over { kU, kDelta, kZ, kDy };

// How the channels and states of a problem are dealt to the threads of a block (tile.cuh).
enum class Layout : int8_t {
  kNarrow,  // float, one state
  kWide,    // float, sixteen states at a time
  kAny,     // float or double, with B or C constant, or with all states
};

// How a tile of an operand is read or written.
enum class Access : int32_t {
  kSingle,     // element by element
  kAlongTime,  // 16 bytes at a time: neighbours in time
  kAlongRows,  // ... neighbouring channels or states
};

// The parameters of all kernels. Absent tensors have no data. What is "in the compute type" is
// contiguous.
struct Inputs : Shape {
  View<3> over[4];  // by Over; (batch, dim, seqlen), delta (batch, dim / delta_repeat, seqlen)
  View<2> A;        // (dim, state)
  View<4>
      projection[2];  // B, C: (batch, group, state, seqlen); constant: strides (0, dim, state, 0)
  // Of these; the launchers find them.
  Access access[4], projection_access[2];
  int log2_operand_bytes;  // of an element of the widest of `over`
  View<1> D, delta_bias;   // (dim), (dim / delta_repeat)

  Sequences sequences;    // with ends where there is seq_idx and no state for each id
  int64_t slots_per_row;  // states of a batch element with seq_idx; 0: one, for its two ends
  int32_t* marks;         // (batch, seqlen): Mark, or null: every batch element is one sequence
  const void* initial;    // (slot, dim, state) in the compute type, or null: zero
  const void* dlast;      // backward: (slot, dim, state) in the compute type, or null: zero
  View<4> dstates;        // backward: (batch, seqlen, dim, state), or absent
  int64_t parts;          // of a sequence, walked at the same time
  void *carry, *factor;   // (part, batch, state, dim) in the compute type; null if parts == 1
  void* kept[4];          // (task, block of states, ...) in the compute type: what threads keep
                          // from tile to tile where they cannot hold all states

  STATESCAN_HOST_DEVICE int64_t tiles() const { return (seqlen + kSteps - 1) / kSteps; }
  int64_t slots() const { return slots_per_row > 0 ? batch * slots_per_row : sequences.slots(); }
};

struct FwdParams : Inputs {
  View<3> y;           // (batch, dim, seqlen)
  Access y_access;     // kAlongTime or kSingle
  void* last;          // (slot, dim, state) in the compute type
  void* states;        // (batch, seqlen, dim, state) in the compute type, or null
  void* chunk_states;  // (batch, chunks, state, dim) in the compute type, or null
};

struct BwdParams : Inputs {
  const void* chunk_states;
  Access chunk_access;

  View<3> gradient[3];  // ddelta (not yet summed over delta_repeat), du, dz: (batch, dim, seqlen)
  Access gradient_access[3];  // kAlongTime or kSingle
  void* dinitial;             // (slot, dim, state) in the compute type, or null
  // Sums of a part of the work each, in the compute type, to be added up in order.
  void* sums[2];  // of B and C: (block of channels, batch, group, seqlen, state); constant: like dA
  void* dA;       // (part, batch, dim, state)
  void *dD, *dbias;  // (part, batch, dim)
};

// How a problem is dealt out; the binding allocates after it. `processors` of the device.
struct Plan {
  Layout layout;
  int channels;            // of a block
  int64_t channel_blocks;  // of a group
  int64_t state_blocks;    // states are walked so many at a time, one block after the other
  int64_t parts;
  int64_t kept;  // elements of each Inputs::kept, 0 where there is one block of states
};
Plan plan(const Shape& p, bool all_states);

// Fills Inputs::marks (and the ends of sequences).
void find_marks(const Inputs& p, cudaStream_t stream);

// Fills Inputs::access and what follows it.
void find_access(Inputs& p);
// Of a view of (batch, dim, seqlen).
Access access_of(const View<3>& x, const Shape& p, int64_t repeat);

// Fills Inputs::carry with the state (backward: the gradient of it) that enters each part.
void find_carries(const Inputs& p, Layout layout, bool backward, cudaStream_t stream);

void fwd(FwdParams p, Layout layout, cudaStream_t stream);
void bwd(BwdParams p, Layout layout, cudaStream_t stream);

}  // namespace statescan::selective_scan::cuda
