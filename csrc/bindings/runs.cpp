#include "bindings/runs.h"

namespace statescan::bindings {

IndexView index_view(const char* name, const Tensor& t, const Tensor& like) {
  check_same_device(name, t, like);
  IndexView v;
  v.wide = t.scalar_type() == ScalarType::Long;
  if (!v.wide && t.scalar_type() != ScalarType::Int) {
    fail(std::string(name) + " must be int32 or int64");
  }
  v.data = t.data_ptr();
  for (int64_t i = 0; i < t.dim(); ++i) v.stride[i] = t.stride(i);
  return v;
}

DeviceSequences device_sequences(const Tensor& like, int64_t batch, int64_t seqlen,
                                 const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
                                 bool with_states) {
  if (seq_idx && cu_seqlens) fail("seq_idx and cu_seqlens say the same thing: give one of them");
  DeviceSequences found{};
  Sequences& s = found.sequences;
  s.batch = batch, s.seqlen = seqlen;
  if (cu_seqlens) {
    if (batch != 1) {
      fail("cu_seqlens packs its sequences into one batch element: batch must be 1, got " +
           std::to_string(batch));
    }
    check_dim("cu_seqlens", *cu_seqlens, "(sequences + 1)", 1);
    s.count = cu_seqlens->size(0) - 1;
    if (s.count < 0 || (s.count == 0 && seqlen > 0)) {
      fail("cu_seqlens must start at 0 and end at seqlen = " + std::to_string(seqlen) + ", got " +
           std::to_string(s.count + 1) + " offsets");
    }
    s.offsets = index_view("cu_seqlens", *cu_seqlens, like);
  } else if (seq_idx) {
    check_shape("seq_idx", *seq_idx, "(batch, seqlen)", {batch, seqlen});
    s.ids = index_view("seq_idx", *seq_idx, like);
    if (with_states && batch > 0) {
      found.ends =
          empty(like, {batch, int64_t(sizeof(RunEnds) / sizeof(int64_t))}, ScalarType::Long);
      s.ends = static_cast<RunEnds*>(found.ends->data_ptr());
    }
  }
  return found;
}

}  // namespace statescan::bindings
