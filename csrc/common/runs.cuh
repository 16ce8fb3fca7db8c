// Sequences as CUDA kernels see them: read from cu_seqlens or seq_idx on the device, where they are
// needed, so that no call waits for the device. What they hold is not checked, only kept within
// bounds: wrong offsets give wrong numbers, never an access outside of a tensor.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/host_device.h"

namespace statescan {

// int32 or int64, any strides.
struct IndexView {
  const void* data = nullptr;
  bool wide = false;  // int64
  int64_t stride[2] = {0, 0};

  STATESCAN_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  STATESCAN_HOST_DEVICE int64_t at(int64_t i, int64_t j = 0) const {
    const int64_t offset = i * stride[0] + j * stride[1];
    return wide ? static_cast<const int64_t*>(data)[offset]
                : int64_t(static_cast<const int32_t*>(data)[offset]);
  }
};

// The slot of batch element b in a pool of states; negative if it has none, or one that does not
// exist.
__device__ __forceinline__ int64_t slot_at(const IndexView& slot_of, int64_t slots, int64_t b) {
  const int64_t slot = slot_of ? slot_of.at(b) : b;
  return slot < slots ? slot : -1;
}

// Of one batch element with seq_idx: its tokens that are not padding, and the runs at their ends.
struct RunEnds {
  int64_t begin, end;  // of all of them; begin == end: there is none
  int64_t first_end;   // of the first run
  int64_t last_begin;  // of the last run
};

struct Sequences {
  int64_t batch, seqlen;
  int64_t count;      // sequences of cu_seqlens
  IndexView offsets;  // (count + 1): cu_seqlens, or absent
  IndexView ids;      // (batch, seqlen): seq_idx, or absent
  RunEnds* ends;      // (batch), with ids where states are wanted, or null

  STATESCAN_HOST_DEVICE int64_t slots() const { return offsets ? count : batch; }
};

// A run of tokens of one sequence, [begin, end), and its slot in the tensors of states.
struct Run {
  int64_t begin, end;
  int64_t slot;  // -1: it has no initial state
};

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

__device__ __forceinline__ Run packed_run(const Sequences& s, int64_t slot) {
  const int64_t begin = clamp(s.offsets.at(slot), 0, s.seqlen);
  return {begin, clamp(s.offsets.at(slot + 1), begin, s.seqlen), slot};
}

// The run that holds token t of batch element b, as far as `reach` tokens to either side: what is
// further is as if it were of the run. `last_first`: sequences are walked from their end, and the
// initial state is the last one's. Padding is a run of no tokens.
__device__ __forceinline__ Run run_at(const Sequences& s, int64_t b, int64_t t, int64_t reach,
                                      bool last_first) {
  if (s.offsets) {
    int64_t low = 0, high = s.count - 1;  // the last sequence that begins at or before t
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (s.offsets.at(middle) <= t) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return packed_run(s, low);
  }
  if (!s.ids) return {0, s.seqlen, b};
  const int64_t id = s.ids.at(b, t);
  if (id < 0) return {t, t, -1};
  int64_t begin = t, end = t + 1;
  while (begin > 0 && t - begin <= reach && s.ids.at(b, begin - 1) == id) --begin;
  while (end < s.seqlen && end - t <= reach && s.ids.at(b, end) == id) ++end;
  const bool has_state =
      s.ends != nullptr && (last_first ? end == s.ends[b].end : begin == s.ends[b].begin);
  return {begin, end, has_state ? b : -1};
}

// Are tokens [begin, end) of batch element b all there, and of one sequence?
__device__ __forceinline__ bool in_one_run(const Sequences& s, int64_t b, int64_t begin,
                                           int64_t end) {
  if (begin < 0 || end > s.seqlen) return false;
  if (s.offsets) {
    const Run run = run_at(s, b, begin, 0, false);
    return begin >= run.begin && end <= run.end;
  }
  if (!s.ids) return true;
  const int64_t id = s.ids.at(b, begin);
  bool same = id >= 0;
  for (int64_t t = begin + 1; t < end; ++t) same = same && s.ids.at(b, t) == id;
  return same;
}

// Fills ends of every batch element.
void find_run_ends(const Sequences& s, cudaStream_t stream);

}  // namespace statescan
