#include "bindings/segments.h"

namespace statescan::bindings {
namespace {

Sequences packed(int64_t batch, int64_t seqlen, const Tensor& cu_seqlens) {
  if (batch != 1) {
    fail("cu_seqlens packs its sequences into one batch element: batch must be 1, got " +
         std::to_string(batch));
  }
  check_dim("cu_seqlens", cu_seqlens, "(sequences + 1)", 1);
  const std::vector<int64_t> offsets = integers("cu_seqlens", cu_seqlens);
  if (offsets.empty() || offsets.front() != 0 || offsets.back() != seqlen) {
    fail("cu_seqlens must start at 0 and end at seqlen = " + std::to_string(seqlen) + ", got " +
         to_string(offsets));
  }
  for (size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] < offsets[i - 1]) {
      fail("cu_seqlens must not decrease, got " + to_string(offsets));
    }
  }
  const int64_t count = int64_t(offsets.size()) - 1;
  return {packed_segments(offsets.data(), count), count, false};
}

}  // namespace

Sequences sequences(int64_t batch, int64_t seqlen, const OptionalTensor& seq_idx,
                    const OptionalTensor& cu_seqlens, const OptionalTensor& initial_state,
                    int64_t initial_state_dim, bool reverse) {
  if (seq_idx && cu_seqlens) fail("seq_idx and cu_seqlens say the same thing: give one of them");
  if (cu_seqlens) return packed(batch, seqlen, *cu_seqlens);
  if (!seq_idx) return {dense_segments(batch, seqlen), batch, false};
  check_shape("seq_idx", *seq_idx, "(batch, seqlen)", {batch, seqlen});
  const std::vector<int64_t> ids = integers("seq_idx", *seq_idx);
  const bool by_id = initial_state && initial_state->dim() == initial_state_dim + 1;
  const int64_t per_row = by_id ? initial_state->size(1) : 1;
  return {indexed_segments(ids.data(), batch, seqlen, by_id ? per_row : 0, reverse),
          batch * per_row, by_id};
}

}  // namespace statescan::bindings
