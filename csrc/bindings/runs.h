// Describes seq_idx and cu_seqlens to CUDA kernels, without a look at what they hold.
#pragma once

#include "bindings/tensor.h"
#include "common/runs.cuh"

namespace statescan::bindings {

// fail unless it is int32 or int64 on the device of `like`.
IndexView index_view(const char* name, const Tensor& t, const Tensor& like);

// Room for what the kernels find out about seq_idx (Sequences::ends); keep it until the launch.
struct DeviceSequences {
  Sequences sequences;
  OptionalTensor ends;
};

// Throws on shapes, dtypes and devices that do not agree with `like`. `with_states`: there are states
// to begin with or to end in.
DeviceSequences device_sequences(const Tensor& like, int64_t batch, int64_t seqlen,
                                 const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
                                 bool with_states);

}  // namespace statescan::bindings
