// What the two directions share: vectors of a line forwards or backwards, and the blocks of a grid.
#pragma once

#include <algorithm>

#include "common/simd.h"
#include "common/stream.h"
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

STATESCAN_INLINE char* plane(const View<4>& x, int64_t b, int64_t k, int64_t d) {
  const int64_t at = b * x.stride[0] + k * x.stride[1] + d * x.stride[2];
  return static_cast<char*>(x.data) + at * element_bytes(x.dtype);
}

STATESCAN_INLINE void copy_plane(void* to, const void* from, int64_t bytes, bool stream) {
  stream ? stream_copy(to, from, bytes) : (void)memcpy(to, from, bytes);
}

// Asks for the plane that comes next, piece by piece while this one is worked on: a plane is too
// short for the hardware to see where its reader is going. Those that would not stay in the
// second-level cache until then are left to it.
class Ahead {
 public:
  Ahead(const void* plane, int64_t bytes)
      : next_(static_cast<const char*>(plane)),
        end_(plane != nullptr && bytes <= 128 * 1024 ? next_ + bytes : next_) {}

  // The next piece of the plane that lies so many bytes behind.
  STATESCAN_INLINE void look(int64_t bytes, int64_t behind) const {
    const char* stop = piece_end(bytes);
    for (const char* at = next_; at < stop; at += 64) __builtin_prefetch(at + behind, 0, 3);
  }

  STATESCAN_INLINE void move(int64_t bytes) { next_ = piece_end(bytes); }

  STATESCAN_INLINE void ask(int64_t bytes) {
    look(bytes, 0);
    move(bytes);
  }

 private:
  STATESCAN_INLINE const char* piece_end(int64_t bytes) const {
    return end_ - next_ < bytes ? end_ : next_ + bytes;
  }

  const char *next_, *end_;
};

// f(i): blocks of `lanes` that cover [0, n), n >= lanes; the last one overlaps the one before it.
template <class F>
STATESCAN_INLINE void for_blocks(int64_t n, int lanes, F&& f) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i);
  if (i < n) f(n - lanes);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::cross_scan
