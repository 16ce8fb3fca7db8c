#include "common/bits.h"
#include "common/tile.h"
#include "cross_scan/cpu_lines.h"

namespace statescan::cross_scan {
namespace STATESCAN_ISA {
namespace {

// Rows [row, row + rows) by columns [column, column + columns) of a grid: what is worked on at a
// time, all routes one after the other, so that every token is stored once. The last tile of a row
// or column overlaps the one before it and finds the same sums again.
struct Tile {
  int64_t row, column;
  int rows, columns;
};

template <class R>
constexpr int kTileElements = 2 * kLanes<R> * kLanes<R>;

// sum = v, or sum += v.
template <class R, bool kAdd>
STATESCAN_INLINE void put(R* sum, Vec<R> v) {
  store(sum, kAdd ? load(sum) + v : v);
}

template <class R, class T, bool kAdd>
STATESCAN_INLINE void add_row(const Line& line, int64_t n, int64_t column, int columns, const T* y,
                              R* sum) {
  constexpr int lanes = kLanes<R>;
  if (line.flip) {
    const T* from = y + line.time + n - lanes - column;
    for (int c = 0; c < columns; c += lanes) {
      put<R, kAdd>(sum + c, reversed<R>(load_convert<R>(from - c)));
    }
  } else {
    const T* from = y + line.time + column;
    for (int c = 0; c < columns; c += lanes) put<R, kAdd>(sum + c, load_convert<R>(from + c));
  }
}

// As many columns as a vector has lanes, and as many rows.
template <class R, class T, bool kAdd>
STATESCAN_INLINE void add_columns(const Line* lines, bool alike, int64_t n, int64_t row, const T* y,
                                  R* sum) {
  constexpr int lanes = kLanes<R>;
  Vec<R> v[lanes];
  const bool flip = lines[0].flip;
  if (std::is_same_v<R, T> && alike) {
    const T* from = y + (flip ? n - lanes - row : row);
    load_transposed<R>([&](int c) { return from + lines[c].time; }, v);
  } else {
#pragma GCC unroll 16
    for (int c = 0; c < lanes; ++c) {
      const Vec<R> column = load_convert<R>(y + time_of(lines[c], n, row, lanes));
      v[c] = lines[c].flip == flip ? column : reversed<R>(column);
    }
    transpose<R>(v);
  }
  R* to = flip ? sum + (lanes - 1) * lanes : sum;
  const int step = flip ? -lanes : lanes;
#pragma GCC unroll 16
  for (int r = 0; r < lanes; ++r) put<R, kAdd>(to + r * step, v[r]);
}

// Twice as many rows of bfloat16: two share a lane while they are transposed, and each is half of a
// float32.
template <bool kAdd>
STATESCAN_INLINE void add_tall_columns(const Line* lines, bool alike, int64_t n, int64_t row,
                                       const BFloat16* y, float* sum) {
  constexpr int lanes = kLanes<float>;
  Vec<uint32_t> v[lanes];
  const bool flip = lines[0].flip;
  if (alike) {
    const BFloat16* from = y + (flip ? n - 2 * lanes - row : row);
    load_transposed<uint32_t>([&](int c) { return from + lines[c].time; }, v);
  } else {
#pragma GCC unroll 16
    for (int c = 0; c < lanes; ++c) {
      const auto column = load_as<Vec<uint16_t>>(y + time_of(lines[c], n, row, 2 * lanes));
      v[c] = (Vec<uint32_t>)(lines[c].flip == flip ? column : reversed<uint16_t>(column));
    }
    transpose<uint32_t>(v);
  }
  float* to = flip ? sum + (2 * lanes - 1) * lanes : sum;
  const int step = flip ? -lanes : lanes;
#pragma GCC unroll 16
  for (int r = 0; r < lanes; ++r) {
    put<float, kAdd>(to + 2 * r * step, (FloatVec)(v[r] << 16));
    put<float, kAdd>(to + (2 * r + 1) * step, (FloatVec)(v[r] & 0xffff0000u));
  }
}

template <class R, class T, bool kAdd>
void add_tile(const Grid& grid, const LineRoute& route, const T* y, Tile tile, R* sum) {
  constexpr int lanes = kLanes<R>;
  const Line* lines = route.lines.data();
  const int64_t n = route.n;
  if (route.stride == 1) {
    lines += tile.row;
    if (tile.columns != lanes) {
      return add_row<R, T, kAdd>(*lines, n, tile.column, tile.columns, y, sum);
    }
    for (int r = 0; r < tile.rows; ++r) {
      add_row<R, T, kAdd>(lines[r], n, tile.column, lanes, y, sum + r * lanes);
    }
    return;
  }
  const int64_t plane = tile.row / grid.n, row = tile.row % grid.n;
  lines += plane * grid.stride + tile.column;
  const bool alike = route.alike;
  if constexpr (std::is_same_v<R, float> && std::is_same_v<T, BFloat16>) {
    if (tile.rows == 2 * lanes) return add_tall_columns<kAdd>(lines, alike, n, row, y, sum);
  }
  for (int r = 0; r < tile.rows; r += lanes) {
    add_columns<R, T, kAdd>(lines, alike, n, row + r, y, sum + r * lanes);
  }
}

template <class R>
void store_sums(const Grid& grid, const Tile& tile, const R* sum, DType dtype, void* plane) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(plane) + tile.row * grid.stride + tile.column;
    for (int r = 0; r < tile.rows; ++r) {
      for (int c = 0; c < tile.columns; c += kLanes<R>) {
        store_convert<R>(to + r * grid.stride + c, load(sum + r * tile.columns + c));
      }
    }
  });
}

// f(tile) for tiles that cover the grid.
template <class R, class F>
STATESCAN_INLINE void for_tiles(const Grid& grid, F&& f) {
  constexpr int lanes = kLanes<R>;
  if (!grid.columns) {
    const int width = int(std::min<int64_t>(kTileElements<R>, grid.stride / lanes * lanes));
    for (int64_t row = 0; row < grid.planes * grid.n; ++row) {
      for_blocks(grid.stride, width, [&](int64_t s) { f(Tile{row, s, 1, width}); });
    }
    return;
  }
  const int rows = grid.n >= 2 * lanes ? 2 * lanes : lanes;
  for (int64_t p = 0; p < grid.planes; ++p) {
    for_blocks(grid.n, rows, [&](int64_t i) {
      for_blocks(grid.stride, lanes, [&](int64_t s) { f(Tile{p * grid.n + i, s, rows, lanes}); });
    });
  }
}

// The sum of `count` routes from the k-th on, always added in this order. `more`: the next channel
// comes next.
template <class R, class T>
void merge_routes(const MergeParams& p, int64_t b, int64_t d, int64_t k, int64_t count, bool more,
                  void* out) {
  const Grid& grid = *p.grid;
  alignas(64) R sum[kTileElements<R>];
  const char* y = plane(p.stack, b, k, d);
  const int64_t route_bytes = p.stack.stride[1] * int64_t(sizeof(T));
  Ahead ahead(more ? y + p.stack.stride[2] * int64_t(sizeof(T)) : nullptr,
              p.length * int64_t(sizeof(T)));
  for_tiles<R>(grid, [&](const Tile& tile) {
    const int64_t bytes = tile.rows * tile.columns * int64_t(sizeof(T));
    for (int64_t i = 0; i < count; ++i) {
      const LineRoute& route = grid.routes[k + i];
      const T* from = reinterpret_cast<const T*>(y + i * route_bytes);
      ahead.look(bytes, i * route_bytes);
      i > 0 ? add_tile<R, T, true>(grid, route, from, tile, sum)
            : add_tile<R, T, false>(grid, route, from, tile, sum);
    }
    ahead.move(bytes);
    store_sums<R>(grid, tile, sum, p.tokens.dtype, out);
  });
}

// A plane is put together in cache and then copied as a whole.
template <class R>
void merge_plane(const MergeParams& p, int64_t task, bool more, void* scratch) {
  const int64_t b = task / p.dim, d = task % p.dim, count = int64_t(p.grid->routes.size());
  const int64_t together = p.sum ? count : 1;
  for (int64_t k = 0; k < count; k += together) {
    with_type(p.stack.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      merge_routes<R, T>(p, b, d, k, together, more && d + 1 < p.dim, scratch);
    });
    copy_plane(plane(p.tokens, b, k, d), scratch, p.length * element_bytes(p.tokens.dtype),
               p.stream);
  }
}

}  // namespace

void merge(const MergeParams& p, const Range& range) {
  for (int64_t task = range.begin; task < range.end; ++task) {
    const bool more = task + 1 < p.tasks();
    p.compute == DType::kFloat64 ? merge_plane<double>(p, task, more, range.scratch)
                                 : merge_plane<float>(p, task, more, range.scratch);
  }
  if (p.stream) end_stream();
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::cross_scan
