// The stream that torch's current work on a tensor's device goes to. Only in CUDA bindings.
#pragma once

#include "bindings/tensor.h"
#include "common/cuda.h"

#if !defined(STATESCAN_SIMT)
#include <torch/csrc/stable/accelerator.h>
#endif

// The dispatch key that CUDA bindings register for. The emulator calls them with tensors of the CPU by
// way of a key that no one else uses, see tests/simt/emulator.py.
#if defined(STATESCAN_SIMT)
#define STATESCAN_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(statescan, PrivateUse1, m)
#else
#define STATESCAN_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(statescan, CUDA, m)
#endif

namespace statescan::bindings {

#if defined(STATESCAN_SIMT)

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream = nullptr;
  int64_t shared_bytes() const { return 227 * 1024; }
};

#else

cudaStream_t current_stream(int32_t device);
// Shared memory that a block may have.
int64_t shared_bytes(int32_t device);

// Makes the tensor's device the current one for as long as this lives.
struct OnDevice {
  explicit OnDevice(const Tensor& t)
      : guard(t.get_device_index()),
        stream(current_stream(t.get_device_index())),
        index(t.get_device_index()) {}
  int64_t shared_bytes() const { return bindings::shared_bytes(index); }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int32_t index;
};

#endif

}  // namespace statescan::bindings
