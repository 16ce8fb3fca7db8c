#include "cross_scan/cpu_lines.h"

namespace statescan::cross_scan {
namespace STATESCAN_ISA {
namespace {

// Elements are moved as integers of their size: no value is changed, and 16-bit ones are widened to
// lanes that can be transposed.
template <class E>
using Lane = std::conditional_t<sizeof(E) == 8, uint64_t, uint32_t>;

template <class E>
STATESCAN_INLINE Vec<Lane<E>> load_bits(const E* p) {
  if constexpr (sizeof(E) == 2) {
    using Narrow = typename VectorOf<uint16_t, kLanes<uint32_t>>::type;
    return __builtin_convertvector(load_as<Narrow>(p), Vec<uint32_t>);
  } else {
    return load(p);
  }
}

template <class E>
STATESCAN_INLINE void store_bits(E* p, Vec<Lane<E>> v) {
  if constexpr (sizeof(E) == 2) {
    using Narrow = typename VectorOf<uint16_t, kLanes<uint32_t>>::type;
    const Narrow narrow = __builtin_convertvector(v, Narrow);
    memcpy(p, &narrow, sizeof(narrow));
  } else {
    store(p, v);
  }
}

// Rows: every line is copied, forwards or backwards.
template <class E>
void copy_rows(const LineRoute& route, const E* x, E* y, Ahead& ahead) {
  constexpr int lanes = kLanes<E>;
  for (int64_t p = 0; p < route.planes; ++p) {
    const Line& line = route.lines[p];
    const E* from = x + p * route.n;
    if (!line.flip) {
      memcpy(y + line.time, from, route.n * sizeof(E));
    } else if (route.n < lanes) {
      for (int64_t i = 0; i < route.n; ++i) y[line.time + route.n - 1 - i] = from[i];
    } else {
      for_blocks(route.n, lanes, [&](int64_t i, int) {
        store(y + time_of(line, route.n, i, lanes), reversed<E>(load(from + i)));
        ahead.ask(lanes * int64_t(sizeof(E)));
      });
    }
  }
}

// Columns: blocks of lanes x lanes tokens are transposed in registers.
template <class E>
void copy_columns(const LineRoute& route, const E* x, E* y, Ahead& ahead) {
  constexpr int lanes = kLanes<Lane<E>>;
  const int64_t n = route.n, stride = route.stride;
  for (int64_t p = 0; p < route.planes; ++p) {
    for_blocks(stride, lanes, [&](int64_t s, int) {
      const Line* lines = route.lines.data() + p * stride + s;
      for_blocks(n, lanes, [&](int64_t i, int) {
        const E* from = x + (p * n + i) * stride + s;
        Vec<Lane<E>> v[lanes];
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) v[r] = load_bits(from + r * stride);
        transpose<Lane<E>>(v);
        ahead.ask(lanes * lanes * int64_t(sizeof(E)));
#pragma GCC unroll 16
        for (int c = 0; c < lanes; ++c) {
          const Vec<Lane<E>> column = lines[c].flip ? reversed<Lane<E>>(v[c]) : v[c];
          store_bits(y + time_of(lines[c], n, i, lanes), column);
        }
      });
    });
  }
}

template <class E>
void copy_route(const LineRoute& route, const E* x, E* y, Ahead& ahead) {
  route.stride == 1 ? copy_rows(route, x, y, ahead) : copy_columns(route, x, y, ahead);
}

// A route is put together in cache and then copied as a whole, past the caches if the result is too
// large for them. Writing it in place would be slower even if it is small: planes of x and y often
// lie a multiple of 4 KiB and a little apart, and the processor takes each load for one that has to
// wait for the store just before it.
template <class E>
void scan_plane(const ScanParams& p, int64_t task, E* scratch) {
  const int64_t b = task / p.dim, d = task % p.dim, count = int64_t(p.routes->size());
  const int64_t bytes = p.length * int64_t(sizeof(E));
  const bool shared = p.tokens.stride[1] == 0;
  const int64_t next = task + 1;
  Ahead ahead(next < p.tasks() ? plane(p.tokens, next / p.dim, 0, next % p.dim) : nullptr,
              shared ? bytes : 0);
  for (int64_t k = 0; k < count; ++k) {
    const LineRoute& route = (*p.routes)[k];
    const E* x = reinterpret_cast<const E*>(plane(p.tokens, b, k, d));
    const bool as_it_is = route.n == p.length && !route.lines[0].flip;
    if (!as_it_is) copy_route(route, x, scratch, ahead);
    copy_plane(plane(p.stack, b, k, d), as_it_is ? x : scratch, bytes, p.stream);
  }
}

}  // namespace

void scan(const ScanParams& p, const Range& range) {
  for (int64_t task = range.begin; task < range.end; ++task) {
    switch (element_bytes(p.tokens.dtype)) {
      case 2: scan_plane(p, task, static_cast<uint16_t*>(range.scratch)); break;
      case 4: scan_plane(p, task, static_cast<uint32_t*>(range.scratch)); break;
      default: scan_plane(p, task, static_cast<uint64_t*>(range.scratch)); break;
    }
  }
  if (p.stream) end_stream();
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::cross_scan
