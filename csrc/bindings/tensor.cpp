#include "bindings/tensor.h"

#include <stdexcept>

namespace statescan::bindings {

std::string to_string(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  }
  return text + "]";
}

Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_shape(const char* name, const Tensor& t, const char* symbols, const Sizes& expected) {
  const Sizes sizes = sizes_of(t);
  if (sizes != expected) {
    fail(std::string(name) + " must have shape " + symbols + " = " + to_string(expected) +
         ", got " + to_string(sizes));
  }
}

void check_dim(const char* name, const Tensor& t, const char* symbols, int64_t dim) {
  if (t.dim() != dim) {
    fail(std::string(name) + " must have shape " + symbols + ", got " + to_string(sizes_of(t)));
  }
}

void check_no_wider(const char* name, const Tensor& t, DType compute) {
  if (compute != DType::kFloat64 && float_dtype(name, t) == DType::kFloat64) {
    fail(std::string(name) + " must be float32, float16 or bfloat16 where no operand is float64, " +
         "got float64");
  }
}

void check_same_device(const char* name, const Tensor& t, const Tensor& like) {
  const bool both_cpu = t.is_cpu() && like.is_cpu();
  if (both_cpu ||
      (t.is_cuda() && like.is_cuda() && t.get_device_index() == like.get_device_index())) {
    return;
  }
  fail(std::string(name) + " must be on the " + (like.is_cpu() ? "CPU" : "device") +
       " like the other tensors");
}

void check_cpu(const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(std::string(name) + " must be on the CPU like the other tensors");
}

DType float_dtype(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: fail(std::string(name) + " must be float32, float16, bfloat16 or float64");
  }
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ScalarType::Float;
    case DType::kFloat16: return ScalarType::Half;
    case DType::kBFloat16: return ScalarType::BFloat16;
    case DType::kFloat64: return ScalarType::Double;
  }
  return ScalarType::Float;
}

DType compute_dtype(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  DType compute = DType::kFloat32;
  for (const auto& [name, t] : tensors) {
    if (t == nullptr) continue;
    check_same_device(name, *t, *tensors.begin()->second);
    if (float_dtype(name, *t) == DType::kFloat64) compute = DType::kFloat64;
  }
  return compute;
}

namespace {

template <class T>
void append(const Tensor& t, std::vector<int64_t>& out) {
  const auto sizes = t.sizes(), strides = t.strides();
  const T* data = static_cast<const T*>(t.data_ptr());
  const int64_t rows = t.dim() == 2 ? sizes[0] : 1, row_stride = t.dim() == 2 ? strides[0] : 0;
  const int64_t columns = sizes[t.dim() - 1], stride = strides[t.dim() - 1];
  out.reserve(rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out.push_back(data[i * row_stride + j * stride]);
  }
}

}  // namespace

std::vector<int64_t> integers(const char* name, const Tensor& t) {
  std::vector<int64_t> out;
  switch (t.scalar_type()) {
    case ScalarType::Int: append<int32_t>(t, out); break;
    case ScalarType::Long: append<int64_t>(t, out); break;
    default: fail(std::string(name) + " must be int32 or int64");
  }
  return out;
}

std::vector<int64_t> slot_indices(const char* name, const Tensor& t, int64_t batch, int64_t slots) {
  check_cpu(name, t);
  check_shape(name, t, "(batch)", {batch});
  std::vector<int64_t> chosen = integers(name, t);
  std::vector<bool> taken(slots);
  for (int64_t slot : chosen) {
    if (slot < 0) continue;
    if (slot >= slots) {
      fail(std::string(name) + " must be less than slots = " + std::to_string(slots) + ", got " +
           std::to_string(slot));
    }
    if (taken[slot]) {
      fail(std::string(name) + " must name each slot once, got " + std::to_string(slot) +
           " twice: two batch elements would update one state");
    }
    taken[slot] = true;
  }
  return chosen;
}

void check_not_expanded(const char* name, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (strides[i] == 0 && sizes[i] > 1) {
      fail(std::string(name) +
           " must not be expanded: it is written, and its elements would share memory");
    }
  }
}

Tensor empty_like(const Tensor& like, ScalarType dtype) {
  StableIValue stack[6] = {torch::stable::detail::from(like),
                           torch::stable::detail::from(std::optional<ScalarType>(dtype)),
                           torch::stable::detail::from(std::nullopt),
                           torch::stable::detail::from(std::nullopt),
                           torch::stable::detail::from(std::nullopt),
                           torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor empty(const Tensor& device_of, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(device_of, sizes, dtype);
}

Tensor zeros(const Tensor& device_of, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_zeros(device_of, sizes, dtype);
}

}  // namespace statescan::bindings
