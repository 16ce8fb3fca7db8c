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
  if (first == 0) return store(acc, before + v);
  const Vec<R> lane = lane_numbers<R>(std::make_integer_sequence<int, kLanes<R>>{});
  store(acc, lane >= splat<R>(R(first)) ? before + v : before);
}

// One line of n >= kLanes tokens, in pieces between which the next plane is asked for.
template <class R, class T, bool kAdd, bool kFlip>
void add_line(const T* y, int64_t n, R* acc, Ahead& ahead) {
  constexpr int lanes = kLanes<R>;
  const auto add = [&](int64_t i, int first) {
    const Vec<R> v = load_convert<R>(y + (kFlip ? n - lanes - i : i));
    put<R, kAdd>(acc + i, kFlip ? reversed<R>(v) : v, first);
  };
  int64_t i = 0;
  while (i + lanes <= n) {
    const int64_t stop = std::min(i + 16 * lanes, n - lanes + 1);
    ahead.ask(16 * lanes * int64_t(sizeof(T)));
    for (; i < stop; i += lanes) add(i, 0);
  }
  if (i < n) add(n - lanes, int(i - (n - lanes)));
}

template <class R, class T, bool kAdd>
void add_rows(const LineRoute& route, const T* y, R* acc, Ahead& ahead) {
  for (int64_t p = 0; p < route.planes; ++p) {
    const Line& line = route.lines[p];
    R* to = acc + p * route.n;
    line.flip ? add_line<R, T, kAdd, true>(y + line.time, route.n, to, ahead)
              : add_line<R, T, kAdd, false>(y + line.time, route.n, to, ahead);
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

// The same for bfloat16 and lines long enough for blocks twice as high: two rows share a lane while
// they are transposed, and each is half of a float32.
template <bool kAdd>
void add_tall_columns(const LineRoute& route, const BFloat16* y, float* acc, Ahead& ahead) {
  constexpr int lanes = kLanes<float>;
  const int64_t n = route.n, stride = route.stride;
  for (int64_t p = 0; p < route.planes; ++p) {
    for_blocks(stride, lanes, [&](int64_t s, int first_column) {
      const Line* lines = route.lines.data() + p * stride + s;
      for_blocks(n, 2 * lanes, [&](int64_t i, int first_row) {
        Vec<uint32_t> v[lanes];
#pragma GCC unroll 16
        for (int c = 0; c < lanes; ++c) {
          const auto column = load_as<Vec<uint16_t>>(y + time_of(lines[c], n, i, 2 * lanes));
          v[c] = (Vec<uint32_t>)(lines[c].flip ? reversed<uint16_t>(column) : column);
        }
        transpose<uint32_t>(v);
        ahead.ask(2 * lanes * lanes * int64_t(sizeof(BFloat16)));
        float* to = acc + (p * n + i) * stride + s;
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) {
          const auto even = (FloatVec)(v[r] << 16), odd = (FloatVec)(v[r] & 0xffff0000u);
          float* row = to + 2 * r * stride;
          if (!kAdd || 2 * r >= first_row) put<float, kAdd>(row, even, first_column);
          if (!kAdd || 2 * r + 1 >= first_row) put<float, kAdd>(row + stride, odd, first_column);
        }
      });
    });
  }
}

template <class R, class T, bool kAdd>
void add_route(const LineRoute& route, const T* y, R* acc, Ahead& ahead) {
  if (route.stride == 1) return add_rows<R, T, kAdd>(route, y, acc, ahead);
  if constexpr (std::is_same_v<R, float> && std::is_same_v<T, BFloat16>) {
    if (route.n >= kLanes<uint16_t>) return add_tall_columns<kAdd>(route, y, acc, ahead);
  }
  add_columns<R, T, kAdd>(route, y, acc, ahead);
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
