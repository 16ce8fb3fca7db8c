// The one way to launch a kernel. Throws std::runtime_error with the kernel's name where CUDA refuses
// the launch. It is also where the emulator (tests/simt) steps in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/cuda.h"

namespace statescan {

inline constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a one-dimensional grid

// Blocks for `tasks` tasks of which each block takes `per_block` at a time. A kernel strides over
// what is beyond: no size is too large for the grid. Nothing to do: 0, which launches nothing.
inline int64_t blocks_for(int64_t tasks, int64_t per_block) {
  return std::min(tasks / per_block + (tasks % per_block != 0), kMaxBlocks);
}

inline void check_cuda(const char* name, int error, const char* text) {
  if (error != 0) throw std::runtime_error(std::string(name) + ": " + text);
}

// Registers that a thread of a kernel takes on the current device.
template <class... Parameters>
int registers_of([[maybe_unused]] const char* name,
                 [[maybe_unused]] void (*kernel)(Parameters...)) {
#if defined(STATESCAN_SIMT)
  return 255;
#else
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  check_cuda(name, error, cudaGetErrorString(error));
  return attributes.numRegs;
#endif
}

// Shared memory is asked for of the kernel, not of the launch: another thread's request must not come
// between the two.
inline std::mutex shared_memory_mutex;

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return;
#if defined(STATESCAN_SIMT)
  (void)stream;
  auto body = [&] { kernel(Parameters(arguments)...); };  // every thread has its own parameters
  simt::run(
      name, dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes,
      [](void* closure) { (*static_cast<decltype(body)*>(closure))(); }, &body);
#else
  auto check = [&](cudaError_t error) { check_cuda(name, error, cudaGetErrorString(error)); };
  std::unique_lock<std::mutex> lock(shared_memory_mutex, std::defer_lock);
  if (shared_bytes > 48 * 1024) {  // more than that has to be asked for
    lock.lock();
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
#endif
}

}  // namespace statescan
