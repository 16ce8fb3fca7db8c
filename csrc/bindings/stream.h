// The stream that torch's current work on a tensor's device goes to. Only in CUDA bindings.
#pragma once

#include <cstdlib>

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
};

inline int64_t shared_memory_of_block(const Tensor&) { return simt::shared_of_block(); }
inline int64_t processors_of(const Tensor&) { return simt::processors; }
inline bool is_hopper(const Tensor&) { return true; }

#else

cudaStream_t current_stream(int32_t device);

// Makes the tensor's device the current one for as long as this lives.
struct OnDevice {
  explicit OnDevice(const Tensor& t)
      : guard(t.get_device_index()), stream(current_stream(t.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

// Bytes of shared memory that a block can have on a tensor's device.
int64_t shared_memory_of_block(const Tensor& t);
// Multiprocessors of the device.
int64_t processors_of(const Tensor& t);
// Has the device the instructions of sm_90a?
bool is_hopper(const Tensor& t);

#endif

// Whether kernels for one kind of GPU are to be passed over for those that run on all
// (STATESCAN_PORTABLE=1): to compare the two.
inline bool only_portable() {
  const char* value = std::getenv("STATESCAN_PORTABLE");
  return value != nullptr && value[0] == '1';
}

}  // namespace statescan::bindings
