// How a batch is cut into sequences: one description for dense batches, packed variable length
// (cu_seqlens) and sequence ids per token (seq_idx).
#pragma once

#include <cstdint>
#include <vector>

namespace statescan {

// Steps [begin, end) of one batch element, all of one sequence, or all padding.
struct Segment {
  int64_t batch;
  int64_t begin;
  int64_t end;
  int64_t initial_slot;  // its entry in initial_state; -1: starts from zero
  int64_t last_slot;     // its entry in last_state; -1: its end is nobody's last state
  bool padding;          // takes no part: output 0, state passed by
};

// Rows are independent of each other; the segments of a row are in the order they are walked
// (backwards in time for a reversed scan).
struct Segments {
  std::vector<Segment> segments;
  std::vector<int64_t> row_offset;  // segments of row r: [row_offset[r], row_offset[r + 1])

  int64_t rows() const { return int64_t(row_offset.size()) - 1; }
};

// Every batch element is one sequence; slot b of the states is batch element b's.
Segments dense_segments(int64_t batch, int64_t seqlen);

// Sequence s is steps [cu_seqlens[s], cu_seqlens[s + 1]) of the one batch element, with slot s.
Segments packed_segments(const int64_t* cu_seqlens, int64_t sequences);

// Tokens with equal neighbouring ids form a sequence, negative ids are padding. `slots` == 0: the
// states have one slot per batch element, the first sequence walked starts from it and the last one
// walked ends in it. `slots` > 0: sequence id i of batch element b has slot b * slots + i.
// Throws std::invalid_argument if then an id is out of range or comes back after another.
Segments indexed_segments(const int64_t* seq_idx, int64_t batch, int64_t seqlen, int64_t slots,
                          bool reverse);

}  // namespace statescan
