#include "common/tile.h"
#include "cross_scan/cpu_lines.h"

namespace statescan::cross_scan {
namespace STATESCAN_ISA {
namespace {

// 0, 1, 2, ..: the lanes' own numbers.
template <class R, int... kLane>
STATESCAN_INLINE Vec<R> lane_numbers(std::integer_sequence<int, kLane...>) {
  return Vec<R>{R(kLane)...};
}

// acc = v, or acc += v in the lanes from `first` on.
template <class R, bool kAdd>
STATESCAN_INLINE void put(R* acc, Vec<R> v, int first) {
  if constexpr (!kAdd) return store(acc, v);
  const Vec<R> before = load(acc);
  const Vec<R> lane = lane_numbers<R>(std::make_integer_sequence<int, kLanes<R>>{});
  store(acc, lane >= splat<R>(R(first)) ? before + v : before);
}

template <class R, class T, bool kAdd>
void add_rows(const LineRoute& route, const T* y, R* acc, Ahead& ahead) {
  constexpr int lanes = kLanes<R>;
  for (int64_t p = 0; p < route.planes; ++p) {
    const Line& line = route.lines[p];
    R* to = acc + p * route.n;
    for_blocks(route.n, lanes, [&](int64_t i, int first) {
      const Vec<R> v = load_convert<R>(y + time_of(line, route.n, i, lanes));
      put<R, kAdd>(to + i, line.flip ? reversed<R>(v) : v, first);
      ahead.ask(lanes * int64_t(sizeof(T)));
    });
  }
}

template <class R, class T, bool kAdd>
void add_columns(const LineRoute& route, const T* y, R* acc, Ahead& ahead) {
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
        ahead.ask(lanes * lanes * int64_t(sizeof(T)));
        R* to = acc + (p * n + i) * stride + s;
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) {
          if (!kAdd || r >= first_row) put<R, kAdd>(to + r * stride, v[r], first_column);
        }
      });
    });
  }
}

template <class R, class T, bool kAdd>
void add_route(const LineRoute& route, const T* y, R* acc, Ahead& ahead) {
  route.stride == 1 ? add_rows<R, T, kAdd>(route, y, acc, ahead)
                    : add_columns<R, T, kAdd>(route, y, acc, ahead);
}

template <class R>
void store_plane(const R* acc, const MergeParams& p, void* out) {
  if (p.tokens.dtype == p.compute) {
    copy_plane(out, acc, p.length * int64_t(sizeof(R)), p.stream);
  } else {
    store_tile<R>(Plane{out, p.tokens.dtype, 0, 1}, 1, int(p.length), acc, 1);
  }
}

// The routes in order, each added to what those before it gave: a fixed order of summation.
template <class R>
void merge_plane(const MergeParams& p, int64_t task, R* acc) {
  const int64_t b = task / p.dim, d = task % p.dim, count = int64_t(p.routes->size());
  for (int64_t k = 0; k < count; ++k) {
    const void* y = plane(p.stack, b, k, d);
    const int64_t next = k + 1 < count ? task : task + 1;
    Ahead ahead(
        next < p.tasks() ? plane(p.stack, next / p.dim, (k + 1) % count, next % p.dim) : nullptr,
        p.length * element_bytes(p.stack.dtype));
    with_type(p.stack.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const LineRoute& route = (*p.routes)[k];
      p.sum&& k > 0 ? add_route<R, T, true>(route, static_cast<const T*>(y), acc, ahead)
                    : add_route<R, T, false>(route, static_cast<const T*>(y), acc, ahead);
    });
    if (p.sum && k + 1 < count) continue;
    store_plane(acc, p, plane(p.tokens, b, p.sum ? 0 : k, d));
  }
}

}  // namespace

void merge(const MergeParams& p, const Range& range) {
  for (int64_t task = range.begin; task < range.end; ++task) {
    p.compute == DType::kFloat64 ? merge_plane(p, task, static_cast<double*>(range.scratch))
                                 : merge_plane(p, task, static_cast<float*>(range.scratch));
  }
  if (p.stream) end_stream();
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::cross_scan
