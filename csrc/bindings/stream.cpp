#include "bindings/stream.h"

#include <dlfcn.h>

#include <stdexcept>

#include "common/launch.h"

namespace statescan::bindings {
namespace {

using GetStream = int32_t (*)(int32_t device, void** stream);

// In torch's CUDA library, which a torch for the CPU does not have: so it is looked for when a tensor
// on a GPU shows that it must be there, and this library does not link to it.
GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  if (found == nullptr) {
    throw std::runtime_error(
        "statescan cannot find torch's current CUDA stream: libtorch_cuda.so is not loaded, or has "
        "no aoti_torch_get_current_cuda_stream");
  }
  return reinterpret_cast<GetStream>(found);
}

}  // namespace

cudaStream_t current_stream(int32_t device) {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  if (get_stream(device, &stream) != 0) {
    throw std::runtime_error("torch has no current CUDA stream for device " +
                             std::to_string(device));
  }
  return static_cast<cudaStream_t>(stream);
}

namespace {

int attribute(const char* name, cudaDeviceAttr which, const Tensor& t) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, t.get_device_index());
  check_cuda(name, error, cudaGetErrorString(error));
  return value;
}

}  // namespace

int64_t shared_memory_of_block(const Tensor& t) {
  return attribute("shared memory of a block", cudaDevAttrMaxSharedMemoryPerBlockOptin, t);
}

int64_t processors_of(const Tensor& t) {
  return attribute("multiprocessors", cudaDevAttrMultiProcessorCount, t);
}

bool is_hopper(const Tensor& t) {
  return attribute("compute capability", cudaDevAttrComputeCapabilityMajor, t) == 9 &&
         attribute("compute capability", cudaDevAttrComputeCapabilityMinor, t) == 0;
}

}  // namespace statescan::bindings
