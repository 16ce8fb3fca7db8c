// Adds up partial sums in a fixed order, which makes a gradient that is summed over tasks
// deterministic.
#pragma once

#include "common/host_device.h"
#include "common/isa.h"
#include "common/view.h"

namespace statescan::partials {

// out[i, j, t, n] = sum over p of partial[p, i, j, t, n], p in order. The elements of one part are
// contiguous, and in the compute type.
struct SumParams {
  const void* partial;
  int64_t parts;
  int64_t count;  // from one part to the next; at least the product of `size`
  DType compute;
  int64_t size[4];
  View<4> out;

  static constexpr int64_t kSteps = 64;  // of t, in one task
  STATESCAN_HOST_DEVICE int64_t tiles() const { return (size[2] + kSteps - 1) / kSteps; }
  int64_t tasks() const { return size[3] == 0 ? 0 : size[0] * size[1] * tiles(); }
};

STATESCAN_CPU_KERNEL(sum, SumParams)

}  // namespace statescan::partials
