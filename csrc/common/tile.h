// Tiles: a few rows (channels, or states) by a few time steps, brought from a tensor of any type
// and strides into tile[t][row] of the type computed in, and back. Conversion and transposition
// happen here and nowhere else; the arithmetic sees one layout.
#pragma once

#include "common/simd.h"
#include "common/view.h"

namespace statescan {
inline namespace STATESCAN_ISA {

// Calls f with a null pointer of the element type.
template <class F>
STATESCAN_INLINE void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f((float*)nullptr);
    case DType::kFloat16: return f((Half*)nullptr);
    case DType::kBFloat16: return f((BFloat16*)nullptr);
    case DType::kFloat64: return f((double*)nullptr);
  }
}

template <class R, class T>
STATESCAN_INLINE R load_one(const T* p) {
  return R(to_float(*p));
}

template <class R, class T>
STATESCAN_INLINE void store_one(T* p, R value) {
  if constexpr (std::is_same_v<T, double>) {
    *p = double(value);
  } else {
    *p = from_float<T>(float(value));
  }
}

template <class R>
STATESCAN_INLINE R load_scalar(DType dtype, const void* data, int64_t offset) {
  R value{};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    value = load_one<R>(static_cast<const T*>(data) + offset);
  });
  return value;
}

template <class R>
STATESCAN_INLINE void store_scalar(DType dtype, void* data, int64_t offset, R value) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    store_one<R>(static_cast<T*>(data) + offset, value);
  });
}

// Asks for the cache lines that load_tile will read. Rows lie far apart, each piece of one is a few
// lines long: too short for the hardware to see a pattern, so the next tile is asked for while this
// one is computed. Into the second-level cache: rows a power of two apart share one set of the first.
template <bool kWrite = false>
STATESCAN_INLINE void prefetch_tile(const Plane& x, int rows, int steps) {
  const int64_t bytes = element_bytes(x.dtype);
  const bool by_row = x.time_stride == 1;
  if (!by_row && x.row_stride != 1) return;
  const int runs = by_row ? rows : steps, length = by_row ? steps : rows;
  const int64_t stride = (by_row ? x.row_stride : x.time_stride) * bytes;
  for (int i = 0; i < runs; ++i) {
    const char* run = static_cast<const char*>(x.data) + i * stride;
    for (int64_t at = 0; at < length * bytes; at += 64) __builtin_prefetch(run + at, kWrite, 1);
  }
}

// Elements from one time step of a tile to the next: whole vectors, except for a single row.
template <class R>
constexpr int tile_pitch(int rows) {
  return rows == 1 ? 1 : (rows + kLanes<R> - 1) / kLanes<R> * kLanes<R>;
}

// Up to kLanes rows: tile[t * pitch + row] = x[row, t], row < rows, t < steps; where the pitch has
// room for them, the lanes beyond `rows` become 0. row_repeat: that many neighbouring tile rows
// read the same row of x, the first of them `row_phase` rows into its run.
template <class R, class T>
void load_lanes(const Plane& x, int rows, int steps, R* tile, int pitch, int64_t row_repeat,
                int64_t row_phase) {
  constexpr int n = kLanes<R>;
  const T* base = static_cast<const T*>(x.data);
  if (rows == n && x.row_stride == 1 && row_repeat == 1) {
    for (int t = 0; t < steps; ++t) {
      store(tile + t * pitch, load_convert<R>(base + t * x.time_stride));
    }
    return;
  }
  const T* row[n];
  for (int r = 0; r < n; ++r) {
    const int64_t source = r < rows ? (row_phase + r) / row_repeat : 0;
    row[r] = base + source * x.row_stride;
  }
  int t = 0;
  if (pitch == 1 && x.time_stride == 1) {
    for (; t + n <= steps; t += n) store(tile + t, load_convert<R>(base + t));
  }
  if (rows > n / 2 && x.time_stride == 1 && pitch >= n) {
    while (t + n <= steps) {
      Vec<R> v[n];
      for (int r = 0; r < n; ++r) v[r] = load_convert<R>(row[r] + t);
      for (int r = rows; r < n; ++r) v[r] = Vec<R>{};
      transpose<R>(v);
      for (int i = 0; i < n; ++i) store(tile + (t + i) * pitch, v[i]);
      if (t + n == steps) return;
      t = t + 2 * n <= steps ? t + n : steps - n;  // the last block overlaps the one before it
    }
  }
  for (; t < steps; ++t) {
    for (int r = 0; r < rows; ++r) tile[t * pitch + r] = load_one<R>(row[r] + t * x.time_stride);
    if (pitch >= n) {
      for (int r = rows; r < n; ++r) tile[t * pitch + r] = 0;
    }
  }
}

// The rows that are neighbours in memory and fill whole vectors, if more than one. A time step's are
// taken together: where steps lie a multiple of a page or so apart, cache lines do not stay for long.
template <class R>
STATESCAN_INLINE int whole_runs(const Plane& x, int rows) {
  return x.row_stride == 1 && rows >= 2 * kLanes<R> ? rows / kLanes<R> * kLanes<R> : 0;
}

// Any number of rows, kLanes at a time; pitch as tile_pitch(rows), or more whole vectors.
template <class R>
void load_tile(const Plane& x, int rows, int steps, R* tile, int pitch, int64_t row_repeat = 1,
               int64_t row_phase = 0) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int whole = row_repeat == 1 && row_phase == 0 ? whole_runs<R>(x, rows) : 0;
    for (int t = 0; t < (whole ? steps : 0); ++t) {
      const T* run = static_cast<const T*>(x.data) + t * x.time_stride;
      for (int r = 0; r < whole; r += kLanes<R>) {
        store(tile + t * pitch + r, load_convert<R>(run + r));
      }
    }
    for (int r = whole; r < rows; r += kLanes<R>) {
      const int count = rows - r < kLanes<R> ? rows - r : kLanes<R>;
      const int64_t phase = row_phase + r;
      const Plane part = x.at(phase / row_repeat, 0);
      load_lanes<R, T>(part, count, steps, tile + r, pitch, row_repeat, phase % row_repeat);
    }
  });
}

template <class R, class T>
void store_lanes(const Plane& x, int rows, int steps, const R* tile, int pitch) {
  constexpr int n = kLanes<R>;
  T* base = static_cast<T*>(x.data);
  if (rows == n && x.row_stride == 1) {
    for (int t = 0; t < steps; ++t) {
      store_convert<R>(base + t * x.time_stride, load(tile + t * pitch));
    }
    return;
  }
  int t = 0;
  if (pitch == 1 && x.time_stride == 1) {
    for (; t + n <= steps; t += n) store_convert<R>(base + t, load(tile + t));
  }
  if (rows > n / 2 && x.time_stride == 1 && pitch >= n) {
    while (t + n <= steps) {
      Vec<R> v[n];
      for (int i = 0; i < n; ++i) v[i] = load(tile + (t + i) * pitch);
      transpose<R>(v);
      for (int r = 0; r < rows; ++r) store_convert<R>(base + r * x.row_stride + t, v[r]);
      if (t + n == steps) return;
      t = t + 2 * n <= steps ? t + n : steps - n;
    }
  }
  for (; t < steps; ++t) {
    for (int r = 0; r < rows; ++r) {
      store_one<R>(base + r * x.row_stride + t * x.time_stride, tile[t * pitch + r]);
    }
  }
}

template <class R>
void store_tile(const Plane& x, int rows, int steps, const R* tile, int pitch) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int whole = whole_runs<R>(x, rows);
    for (int t = 0; t < (whole ? steps : 0); ++t) {
      T* run = static_cast<T*>(x.data) + t * x.time_stride;
      for (int r = 0; r < whole; r += kLanes<R>) {
        store_convert<R>(run + r, load(tile + t * pitch + r));
      }
    }
    for (int r = whole; r < rows; r += kLanes<R>) {
      const int count = rows - r < kLanes<R> ? rows - r : kLanes<R>;
      store_lanes<R, T>(x.at(r, 0), count, steps, tile + r, pitch);
    }
  });
}

}  // namespace STATESCAN_ISA
}  // namespace statescan
