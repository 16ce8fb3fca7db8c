#include "common/tile.h"
#include "cross_scan/cpu_lines.h"

namespace statescan::cross_scan {
namespace STATESCAN_ISA {
namespace {

// acc = v, or acc += v, in the lanes from `first` on.
template <class R, bool kAdd>
STATESCAN_INLINE void put(R* acc, Vec<R> v, int first) {
  if constexpr (!kAdd) return store(acc, v);
  const Vec<R> sum = load(acc) + v;
  if (first == 0) return store(acc, sum);
  for (int i = first; i < kLanes<R>; ++i) acc[i] = sum[i];
}

template <class R, class T, bool kAdd>
void add_rows(const LineRoute& route, const T* y, R* acc) {
  constexpr int lanes = kLanes<R>;
  for (int64_t p = 0; p < route.planes; ++p) {
    const Line& line = route.lines[p];
    R* to = acc + p * route.n;
    for_blocks(route.n, lanes, [&](int64_t i, int first) {
      const Vec<R> v = load_convert<R>(y + time_of(line, route.n, i, lanes));
      put<R, kAdd>(to + i, line.flip ? reversed<R>(v) : v, first);
    });
  }
}

template <class R, class T, bool kAdd>
void add_columns(const LineRoute& route, const T* y, R* acc) {
  constexpr int lanes = kLanes<R>;
  const int64_t n = route.n, stride = route.stride;
  for (int64_t p = 0; p < route.planes; ++p) {
    for_blocks(stride, lanes, [&](int64_t s, int first_column) {
      const Line* lines = route.lines.data() + p * stride + s;
      for_blocks(n, lanes, [&](int64_t i, int first_row) {
        Vec<R> v[lanes];
#pragma GCC unroll 16
        for (int c = 0; c < lanes; ++c) {
          const Vec<R> column = load_convert<R>(y + time_of(lines[c], n, i, lanes));
          v[c] = lines[c].flip ? reversed<R>(column) : column;
        }
        transpose<R>(v);
        R* to = acc + (p * n + i) * stride + s;
        for (int r = kAdd ? first_row : 0; r < lanes; ++r) {
          put<R, kAdd>(to + r * stride, v[r], first_column);
        }
      });
    });
  }
}

template <class R, class T, bool kAdd>
void add_route(const LineRoute& route, const T* y, R* acc) {
  route.stride == 1 ? add_rows<R, T, kAdd>(route, y, acc)
                    : add_columns<R, T, kAdd>(route, y, acc);
}

template <class R>
void store_plane(const R* acc, int64_t length, DType dtype, void* out) {
  if (acc == out) return;
  store_tile<R>(Plane{out, dtype, 0, 1}, 1, int(length), acc, 1);
}

// The routes in order, each added to what those before it gave: a fixed order of summation.
template <class R>
void merge_plane(const MergeParams& p, int64_t b, int64_t d, R* scratch) {
  const int64_t* from = p.stack.stride;
  const int64_t* to = p.tokens.stride;
  const bool in_place = p.tokens.dtype == p.compute;
  for (size_t k = 0; k < p.routes->size(); ++k) {
    const int64_t at = b * to[0] + (p.sum ? 0 : k) * to[1] + d * to[2];
    char* out = static_cast<char*>(p.tokens.data) + at * element_bytes(p.tokens.dtype);
    R* acc = in_place ? reinterpret_cast<R*>(out) : scratch;
    with_type(p.stack.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* y = static_cast<const T*>(p.stack.data) + b * from[0] + k * from[1] + d * from[2];
      const LineRoute& route = (*p.routes)[k];
      p.sum && k > 0 ? add_route<R, T, true>(route, y, acc)
                     : add_route<R, T, false>(route, y, acc);
    });
    if (!p.sum || k + 1 == p.routes->size()) store_plane(acc, p.length, p.tokens.dtype, out);
  }
}

}  // namespace

void merge(const MergeParams& p, const Range& range) {
  for (int64_t task = range.begin; task < range.end; ++task) {
    const int64_t b = task / p.dim, d = task % p.dim;
    p.compute == DType::kFloat64 ? merge_plane(p, b, d, static_cast<double*>(range.scratch))
                                 : merge_plane(p, b, d, static_cast<float*>(range.scratch));
  }
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::cross_scan
