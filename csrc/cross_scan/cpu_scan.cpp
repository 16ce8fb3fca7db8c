#include "common/bits.h"
#include "cross_scan/cpu_lines.h"

namespace statescan::cross_scan {
namespace STATESCAN_ISA {
namespace {

// One line backwards, in pieces between which the next plane is asked for.
template <class E>
void copy_flipped(const E* x, int64_t n, E* y, Ahead& ahead) {
  constexpr int lanes = kLanes<E>;
  if (n < lanes) {
    for (int64_t i = 0; i < n; ++i) y[n - 1 - i] = x[i];
    return;
  }
  const auto copy = [&](int64_t i) { store(y + n - lanes - i, reversed<E>(load(x + i))); };
  int64_t i = 0;
  while (i + lanes <= n) {
    const int64_t stop = std::min(i + 16 * lanes, n - lanes + 1);
    ahead.ask(16 * lanes * int64_t(sizeof(E)));
    for (; i < stop; i += lanes) copy(i);
  }
  copy(n - lanes);
}

// Rows: every line is copied, forwards or backwards.
template <class E>
void copy_rows(const LineRoute& route, const E* x, E* y, Ahead& ahead) {
  for (int64_t p = 0; p < route.planes; ++p) {
    const Line& line = route.lines[p];
    const E* from = x + p * route.n;
    line.flip ? copy_flipped(from, route.n, y + line.time, ahead)
              : (void)memcpy(y + line.time, from, route.n * sizeof(E));
  }
}

// Columns: blocks of lanes x lanes tokens are transposed in registers.
template <class E>
void copy_columns(const LineRoute& route, const E* x, E* y, Ahead& ahead) {
  constexpr int lanes = kLanes<Lane<E>>;
  const int64_t n = route.n, stride = route.stride;
  for (int64_t p = 0; p < route.planes; ++p) {
    for_blocks(stride, lanes, [&](int64_t s) {
      const Line* lines = route.lines.data() + p * stride + s;
      for_blocks(n, lanes, [&](int64_t i) {
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

// The same for 16-bit elements and lines long enough for blocks twice as high: two rows share a lane,
// so that each column comes out as one whole vector.
void copy_tall_columns(const LineRoute& route, const uint16_t* x, uint16_t* y, Ahead& ahead) {
  constexpr int lanes = kLanes<uint32_t>;
  const int64_t n = route.n, stride = route.stride;
  for (int64_t p = 0; p < route.planes; ++p) {
    for_blocks(stride, lanes, [&](int64_t s) {
      const Line* lines = route.lines.data() + p * stride + s;
      for_blocks(n, 2 * lanes, [&](int64_t i) {
        const uint16_t* from = x + (p * n + i) * stride + s;
        Vec<uint32_t> v[lanes];
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) {
          v[r] = load_bits(from + 2 * r * stride) | load_bits(from + (2 * r + 1) * stride) << 16;
        }
        transpose<uint32_t>(v);
        ahead.ask(2 * lanes * lanes * int64_t(sizeof(uint16_t)));
#pragma GCC unroll 16
        for (int c = 0; c < lanes; ++c) {
          const auto column = (Vec<uint16_t>)v[c];
          store(y + time_of(lines[c], n, i, 2 * lanes),
                lines[c].flip ? reversed<uint16_t>(column) : column);
        }
      });
    });
  }
}

template <class E>
void copy_route(const LineRoute& route, const E* x, E* y, Ahead& ahead) {
  if (route.stride == 1) return copy_rows(route, x, y, ahead);
  if constexpr (sizeof(E) == 2) {
    if (route.n >= kLanes<uint16_t>) return copy_tall_columns(route, x, y, ahead);
  }
  copy_columns(route, x, y, ahead);
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
    with_bits(p.tokens.dtype,
              [&](auto* type) { scan_plane(p, task, static_cast<decltype(type)>(range.scratch)); });
  }
  if (p.stream) end_stream();
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::cross_scan
