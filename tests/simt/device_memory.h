// Memory of the device for the kernels of these tests: a GPU's, or the emulator's.
#pragma once

#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/launch.h"

#if defined(STATESCAN_SIMT)
#include "checker.h"
#endif

namespace statescan::tests {

#if defined(STATESCAN_SIMT)

inline void* allocate(size_t bytes) {
  void* p = aligned_alloc(256, (bytes + 255) / 256 * 256);
  simt::add_buffer(p, bytes);
  return p;
}
inline void release(void* p) {
  simt::remove_buffer(p);
  free(p);
}
inline void copy(void* to, const void* from, size_t bytes) {
  simt::copy_device_memory(to, from, bytes);
}

#else

inline void check(cudaError_t error) { check_cuda("memory", error, cudaGetErrorString(error)); }
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes));
  return p;
}
inline void release(void* p) { cudaFree(p); }
inline void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));  // waits for the kernels before
}

#endif

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values)
      : size_(values.size()), data_(static_cast<T*>(allocate(size_ * sizeof(T)))) {
    copy(data_, values.data(), size_ * sizeof(T));
  }
  explicit DeviceArray(size_t size, T value = T{}) : DeviceArray(std::vector<T>(size, value)) {}
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { release(data_); }

  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> all(size_);
    copy(all.data(), data_, size_ * sizeof(T));
    return all;
  }

 private:
  size_t size_;
  T* data_;
};

// A test of the kernels in a file: run(0) launches and compares, and throws if something is wrong.
// run(fault) for fault > 0 plants that fault into the kernel.
struct Case {
  const char* name;
  void (*run)(int fault);
  int resident = 1;  // blocks that have to run at the same time
};

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("wrong result: ") + what);
}

}  // namespace statescan::tests

// What the tests call: cases by number, in every file that has some.
#define STATESCAN_CASES(prefix, cases)                                                          \
  extern "C" {                                                                                  \
  __attribute__((visibility("default"))) int prefix##_count() { return int(std::size(cases)); } \
  __attribute__((visibility("default"))) const char* prefix##_name(int i) {                     \
    return cases[i].name;                                                                       \
  }                                                                                             \
  __attribute__((visibility("default"))) int prefix##_resident(int i) {                         \
    return cases[i].resident;                                                                   \
  }                                                                                             \
  __attribute__((visibility("default"))) const char* prefix##_run(int i, int fault) {           \
    static std::string error;                                                                   \
    error.clear();                                                                              \
    try {                                                                                       \
      cases[i].run(fault);                                                                      \
    } catch (const std::exception& e) {                                                         \
      error = e.what();                                                                         \
    }                                                                                           \
    return error.c_str();                                                                       \
  }                                                                                             \
  }
