// Between torch's tensors and the kernels' views: checks that name the argument, what was expected
// and what came; views; allocation. Stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/view.h"

namespace statescan::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// "[2, 16, 1024]"
std::string to_string(const Sizes& sizes);
Sizes sizes_of(const Tensor& t);

// Throws std::invalid_argument, which Python sees as ValueError.
[[noreturn]] void fail(const std::string& message);

// fail unless t has `expected` sizes; `symbols` are their names: "(batch, dim, seqlen)".
void check_shape(const char* name, const Tensor& t, const char* symbols, const Sizes& expected);
void check_dim(const char* name, const Tensor& t, const char* symbols, int64_t dim);
void check_cpu(const char* name, const Tensor& t);
// fail unless both are on the CPU, or on the same GPU.
void check_same_device(const char* name, const Tensor& t, const Tensor& like);
// float64 only where `compute` is.
void check_no_wider(const char* name, const Tensor& t, DType compute);

// fail unless the dtype is one of the four floating-point types.
DType float_dtype(const char* name, const Tensor& t);
ScalarType scalar_type(DType dtype);

// The type to compute in: kFloat64 if any of these tensors is, else kFloat32. Null: absent. fail unless
// all of them are on the device of the first, which is there.
DType compute_dtype(std::initializer_list<std::pair<const char*, const Tensor*>> tensors);
inline const Tensor* pointer(const OptionalTensor& t) { return t ? &*t : nullptr; }

// The contents of a one- or two-dimensional int32 or int64 tensor.
std::vector<int64_t> integers(const char* name, const Tensor& t);

// (batch) integers: the slot of each batch element in a pool of states. Negative: none. fail if one is
// not below `slots`, or if two elements would update the same one.
std::vector<int64_t> slot_indices(const char* name, const Tensor& t, int64_t batch, int64_t slots);

// fail if t, which is to be written, is expanded: some of its elements would share memory.
void check_not_expanded(const char* name, const Tensor& t);

// Uninitialized, in the memory order of `like`.
Tensor empty_like(const Tensor& like, ScalarType dtype);
Tensor empty(const Tensor& device_of, const Sizes& sizes, ScalarType dtype);
Tensor zeros(const Tensor& device_of, const Sizes& sizes, ScalarType dtype);

template <int kRank>
View<kRank> view(const char* name, const Tensor& t) {
  View<kRank> v;
  v.data = t.data_ptr();
  v.dtype = float_dtype(name, t);
  const auto strides = t.strides();
  for (int i = 0; i < kRank; ++i) v.stride[i] = strides[i];
  return v;
}

template <int kRank>
View<kRank> view(const char* name, const OptionalTensor& t) {
  return t ? view<kRank>(name, *t) : View<kRank>{};
}

}  // namespace statescan::bindings
