#include "route_gather/kernels.h"

#include <algorithm>

namespace statescan::route_gather {

// Waking another thread costs as much as some ten thousand elements.
int64_t Problem::grain() const {
  const int64_t elements = batch * dim * std::max(count * steps, length);
  return std::max<int64_t>(1, tasks() * 16384 / std::max<int64_t>(elements, 1));
}

}  // namespace statescan::route_gather
