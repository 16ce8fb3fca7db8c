#include "common/segments.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace statescan {

Segments dense_segments(int64_t batch, int64_t seqlen) {
  Segments all;
  for (int64_t b = 0; b < batch; ++b) {
    all.row_offset.push_back(b);
    all.segments.push_back({b, 0, seqlen, b, b, false});
  }
  all.row_offset.push_back(batch);
  return all;
}

Segments packed_segments(const int64_t* cu_seqlens, int64_t sequences) {
  Segments all;
  for (int64_t s = 0; s < sequences; ++s) {
    all.row_offset.push_back(s);
    all.segments.push_back({0, cu_seqlens[s], cu_seqlens[s + 1], s, s, false});
  }
  all.row_offset.push_back(sequences);
  return all;
}

namespace {

// The runs of equal ids of one batch element, in the order they are walked; no slots yet.
std::vector<Segment> runs(const int64_t* ids, int64_t b, int64_t seqlen, bool reverse) {
  std::vector<Segment> found;
  for (int64_t t = 0; t < seqlen;) {
    int64_t end = t + 1;
    while (end < seqlen && ids[end] == ids[t]) ++end;
    found.push_back({b, t, end, -1, -1, ids[t] < 0});
    t = end;
  }
  if (reverse) std::reverse(found.begin(), found.end());
  return found;
}

void give_slots_by_id(const int64_t* ids, int64_t b, int64_t slots, std::vector<Segment>& row) {
  std::vector<bool> seen(slots, false);
  for (Segment& segment : row) {
    if (segment.padding) continue;
    const int64_t id = ids[segment.begin];
    if (id >= slots) {
      throw std::invalid_argument("seq_idx must be below the number of initial states = " +
                                  std::to_string(slots) + ", got " + std::to_string(id));
    }
    if (seen[id]) {
      throw std::invalid_argument("seq_idx " + std::to_string(id) +
                                  " comes back in batch element " + std::to_string(b) +
                                  " after another sequence");
    }
    seen[id] = true;
    segment.initial_slot = segment.last_slot = b * slots + id;
  }
  for (int64_t id = 0; id < slots; ++id) {  // absent: its last state is its initial state
    if (!seen[id]) row.push_back({b, 0, 0, b * slots + id, b * slots + id, false});
  }
}

void give_slot_to_ends(int64_t b, std::vector<Segment>& row) {
  Segment* first = nullptr;
  Segment* last = nullptr;
  for (Segment& segment : row) {
    if (segment.padding) continue;
    if (first == nullptr) first = &segment;
    last = &segment;
  }
  if (first == nullptr) {
    row.push_back({b, 0, 0, b, b, false});
  } else {
    first->initial_slot = last->last_slot = b;
  }
}

}  // namespace

Segments indexed_segments(const int64_t* seq_idx, int64_t batch, int64_t seqlen, int64_t slots,
                          bool reverse) {
  Segments all;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* ids = seq_idx + b * seqlen;
    std::vector<Segment> row = runs(ids, b, seqlen, reverse);
    if (slots > 0) {
      give_slots_by_id(ids, b, slots, row);
    } else {
      give_slot_to_ends(b, row);
    }
    all.row_offset.push_back(int64_t(all.segments.size()));
    all.segments.insert(all.segments.end(), row.begin(), row.end());
  }
  all.row_offset.push_back(int64_t(all.segments.size()));
  return all;
}

}  // namespace statescan
