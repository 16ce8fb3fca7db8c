// Reads seq_idx and cu_seqlens into the kernels' description of sequences.
#pragma once

#include "bindings/tensor.h"
#include "common/segments.h"

namespace statescan::bindings {

struct Sequences {
  Segments segments;
  int64_t slots;     // entries of a tensor of states
  bool slots_by_id;  // initial_state is (batch, sequence, ...), flattened to `slots`
};

// `initial_state_dim`: the rank of one state plus one; an initial_state of one more dimension has a
// sequence axis, which seq_idx picks from. Throws on shapes and values that make no sense.
Sequences sequences(int64_t batch, int64_t seqlen, const OptionalTensor& seq_idx,
                    const OptionalTensor& cu_seqlens, const OptionalTensor& initial_state,
                    int64_t initial_state_dim, bool reverse);

}  // namespace statescan::bindings
