// What a kernel knows of a tensor: where it is, what its elements are, how far apart they lie.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace statescan {

enum class DType : int8_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

STATESCAN_HOST_DEVICE constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A strided tensor of kRank dimensions, strides in elements. An absent optional tensor has no data.
template <int kRank>
struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[kRank] = {};

  STATESCAN_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// The part of a tensor that a tile reads or writes: rows (channels or states) against time.
struct Plane {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t row_stride = 0;   // elements from one row to the next
  int64_t time_stride = 0;  // elements from one time step to the next

  STATESCAN_HOST_DEVICE Plane shifted(int64_t elements) const {
    return {static_cast<char*>(data) + elements * element_bytes(dtype), dtype, row_stride,
            time_stride};
  }
  STATESCAN_HOST_DEVICE Plane at(int64_t row, int64_t time) const {
    return shifted(row * row_stride + time * time_stride);
  }
};

// The rows of x at batch element `batch` (or of the states at slot `batch`), from `row` and `time` on.
STATESCAN_HOST_DEVICE Plane plane(const View<3>& x, int64_t batch, int64_t row, int64_t time) {
  return Plane{x.data, x.dtype, x.stride[1], x.stride[2]}.at(row, time).shifted(batch *
                                                                                x.stride[0]);
}

}  // namespace statescan
