// What each token is to a scan over sequences: found once, before the kernels that walk them.
#pragma once

#include "common/runs.cuh"

namespace statescan {

// What a token is, in the order of the scan.
enum Mark : int {
  kPadding = 1,
  kStart = 2,     // the state starts anew
  kFromSlot = 4,  // ... from an initial state
  kToSlot = 8,    // the state after it is a last state
};

// marks (batch, seqlen) of the sequences. `slots_per_row`: states of a batch element with seq_idx,
// or 0: one for its two ends.
void find_marks(const Sequences& s, int64_t slots_per_row, bool reverse, int32_t* marks,
                cudaStream_t stream);

// The slot of a token whose mark says that there is one.
__device__ __forceinline__ int64_t marked_slot(const Sequences& s, int64_t slots_per_row, int64_t b,
                                               int64_t t) {
  if (s.offsets) return run_at(s, b, t, 0, false).slot;
  return slots_per_row > 0 ? b * slots_per_row + s.ids.at(b, t) : b;
}

}  // namespace statescan
