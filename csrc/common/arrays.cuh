// Copies of states and sums of parts, which the scans on the GPU share.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/view.h"

namespace statescan {

// A strided copy of states (slot, dim, state); no source: zeros.
void copy_states(const View<3>& from, const View<3>& to, int64_t slots, int64_t dim, int64_t state,
                 cudaStream_t stream);
// out = the sum of `parts` pieces of `size`, in a fixed order.
void add_up(const void* partial, DType compute, int64_t parts, const int64_t (&size)[4],
            const View<4>& out, cudaStream_t stream);

}  // namespace statescan
