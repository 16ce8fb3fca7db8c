// What the two directions share: vectors of a line forwards or backwards, and the blocks of a grid.
#pragma once

#include <algorithm>

#include "common/simd.h"
#include "cross_scan/kernels.h"

namespace statescan::cross_scan {
namespace STATESCAN_ISA {

template <class V, int... kLane>
STATESCAN_INLINE V reversed(V v, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane);
  return shuffle(v, v, std::integer_sequence<int, (n - 1 - kLane)...>{});
}

template <class R>
STATESCAN_INLINE Vec<R> reversed(Vec<R> v) {
  return reversed(v, std::make_integer_sequence<int, kLanes<R>>{});
}

// Where the vector of a line that begins with its token i lies in time.
STATESCAN_INLINE int64_t time_of(const Line& line, int64_t n, int64_t i, int lanes) {
  return line.time + (line.flip ? n - lanes - i : i);
}

// f(i, first): blocks of `lanes` that cover [0, n), n >= lanes; what is before `first` has been in
// the block before, which the last one overlaps.
template <class F>
STATESCAN_INLINE void for_blocks(int64_t n, int lanes, F&& f) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, 0);
  if (i < n) f(n - lanes, int(i - (n - lanes)));
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::cross_scan
