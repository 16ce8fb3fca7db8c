// Shared memory, by type: a kernel names a struct and gets the block's one object of it.
#pragma once

#include "common/cuda.h"
#include "common/host_device.h"

namespace statescan {

// An array in shared memory. In the emulator an index out of its bounds is reported, also where it
// would hit the next member of the struct.
template <class T, int kSize>
struct SharedArray {
  T element[kSize];

  STATESCAN_HOST_DEVICE T& operator[](int i) {
#if defined(STATESCAN_SIMT)
    if (i < 0 || i >= kSize) simt::fail("index %d of a SharedArray of %d elements", i, kSize);
#endif
    return element[i];
  }
};

// Two objects of one type in a kernel differ in kTag.
template <class T, int kTag = 0>
__device__ __forceinline__ T& block_shared() {
#if defined(STATESCAN_SIMT)
  static const char key = 0;
  return *static_cast<T*>(simt::static_shared(&key, sizeof(T)));
#else
  __shared__ T object;
  return object;
#endif
}

// As large as the launch says: for structs with a run-time size after them, or above 48 KiB.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(STATESCAN_SIMT)
  return static_cast<T*>(simt::dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char statescan_dynamic_shared[];
  return reinterpret_cast<T*>(statescan_dynamic_shared);
#endif
}

}  // namespace statescan
