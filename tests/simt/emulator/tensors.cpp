// Tensors become device memory when a binding asks for their address: the bindings are linked with
// --wrap=aoti_torch_get_data_ptr, so that their calls of that function end here. A tensor's buffer is
// what its sizes and strides span, not the whole of its storage.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "checker.h"

extern "C" AOTITorchError __wrap_aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = aoti_torch_get_data_ptr(tensor, data);
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr, elements = 1;
  int32_t dtype = 0;
  if (error != AOTI_TORCH_SUCCESS || aoti_torch_get_dim(tensor, &dim) ||
      aoti_torch_get_sizes(tensor, &sizes) || aoti_torch_get_strides(tensor, &strides) ||
      aoti_torch_get_dtype(tensor, &dtype)) {
    return error;
  }
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] == 0) return error;
    elements += (sizes[i] - 1) * strides[i];
  }
  simt::add_buffer(*data, size_t(elements) * aoti_torch_dtype_element_size(dtype));
  return error;
}
