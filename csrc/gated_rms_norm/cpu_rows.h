// What the forward and the backward of the CPU norm share: which rows lie together, tiles of them, and
// loops over the channels of a row.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/scratch.h"
#include "common/tile.h"
#include "common/vector_math.h"
// after the mathematics that it uses
#include "gated_rms_norm/equations.h"
#include "gated_rms_norm/kernels.h"

namespace statescan::gated_rms_norm {
namespace STATESCAN_ISA {

// ---- Loops over channels. `count` is how many lanes of a vector there are: a constant, but at the end.

template <class R, class T, class Count>
STATESCAN_INLINE Vec<R> load_part(const T* x, Count count) {
  if (count == kLanes<R>) return load_convert<R>(x);
  Vec<R> v{};
  for (int i = 0; i < count && i < kLanes<R>; ++i) v[i] = R(to_float(x[i]));
  return v;
}

template <class R, class T, class Count>
STATESCAN_INLINE void store_part(T* x, Vec<R> v, Count count) {
  if (count == kLanes<R>) return store_convert<R>(x, v);
  for (int i = 0; i < count && i < kLanes<R>; ++i) store_one<R>(x + i, v[i]);
}

// f(channel, count) for n channels.
template <class R, class F>
STATESCAN_INLINE void for_channels(int64_t n, F&& f) {
  int64_t c = 0;
  for (; c + kLanes<R> <= n; c += kLanes<R>) f(c, std::integral_constant<int, kLanes<R>>{});
  if (c < n) f(c, int(n - c));
}

// The sum over n channels of f(channel, count), a vector that is zero beyond `count`. Four sums, so that
// additions do not wait for one another.
template <class R, class F>
STATESCAN_INLINE R sum_channels(int64_t n, F&& f) {
  constexpr std::integral_constant<int, kLanes<R>> whole{};
  Vec<R> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * whole <= n; c += 4 * whole) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += f(c + i * whole, whole);
  }
  for (; c + whole <= n; c += whole) sum[0] += f(c, whole);
  if (c < n) sum[1] += f(c, int(n - c));
  return sum_lanes_of<R>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class R, class Count>
STATESCAN_INLINE Vec<R> only_first(Vec<R> v, Count count) {
  for (int i = count; i < kLanes<R>; ++i) v[i] = 0;
  return v;
}

template <class R, class T>
void load_row(const T* x, int64_t n, R* row) {
  for_channels<R>(
      n, [&](int64_t c, auto count) { store_part<R>(row + c, load_part<R>(x + c, count), count); });
}

template <class R, class T>
void store_row(T* x, int64_t n, const R* row) {
  for_channels<R>(
      n, [&](int64_t c, auto count) { store_part<R>(x + c, load_part<R>(row + c, count), count); });
}

// ---- Rows that lie together: they differ in the innermost dimension in front of the channels.

struct Place {
  int64_t index[kLead];
  int count;  // rows from there on

  STATESCAN_INLINE Plane plane(const Rows& x, int64_t channel) const {
    int64_t offset = channel * x.stride[kLead];
    for (int i = 0; i < kLead; ++i) offset += index[i] * x.stride[i];
    return Plane{x.data, x.dtype, x.stride[kLead], x.stride[kLead - 1]}.shifted(offset);
  }
};

// f(place) for rows [begin, end), at most `most` at a time.
template <class F>
STATESCAN_INLINE void for_places(const Problem& p, int64_t begin, int64_t end, int64_t most,
                                 F&& f) {
  while (begin < end) {
    Place place;
    int64_t rest = begin;
    for (int i = kLead - 1; i >= 0; --i) {
      place.index[i] = rest % p.lead[i];
      rest /= p.lead[i];
    }
    const int64_t left = p.lead[kLead - 1] - place.index[kLead - 1];
    place.count = int(std::min({left, end - begin, most}));
    f(place);
    begin += place.count;
  }
}

// Row i of a tile, or of a tensor in place, is data + i * pitch.
template <class T>
struct Block {
  T* data;
  int64_t pitch;

  STATESCAN_INLINE T* row(int i) const { return data + i * pitch; }
  STATESCAN_INLINE Block from(int i) const { return {data + i * pitch, pitch}; }
  STATESCAN_INLINE operator Block<const T>() const { return {data, pitch}; }
};

template <class T>
STATESCAN_INLINE Block<T> block_of(const Rows& x, const Place& place, int64_t channel) {
  if (!x) return {nullptr, 0};
  const Plane rows = place.plane(x, channel);
  return {static_cast<T*>(rows.data), rows.time_stride};
}

// f(first row, rows) for batches of `count` rows.
template <class F>
STATESCAN_INLINE void for_batches(const Problem& p, int count, F&& f) {
  const int most = int(p.batch());
  for (int i = 0; i < count; i += most) f(i, std::min(most, count - i));
}

template <class R>
void load_rows(const Rows& x, const Place& place, int64_t channel, int64_t n, Block<R> tile) {
  const Plane from = place.plane(x, channel);
  if (from.row_stride != 1) {
    return load_tile(from, int(n), place.count, tile.data, int(tile.pitch));
  }
  with_type(from.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(from.data);
    for (int i = 0; i < place.count; ++i) {
      load_row<R>(data + i * from.time_stride, n, tile.row(i));
    }
  });
}

template <class R>
void store_rows(const Rows& x, const Place& place, int64_t channel, int64_t n, Block<R> tile) {
  const Plane to = place.plane(x, channel);
  if (to.row_stride != 1) {
    return store_tile(to, int(n), place.count, tile.data, int(tile.pitch));
  }
  with_type(to.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(to.data);
    for (int i = 0; i < place.count; ++i) {
      store_row<R>(data + i * to.time_stride, n, tile.row(i));
    }
  });
}

// tile += x
template <class R>
void add_rows(const Rows& x, const Place& place, int64_t channel, int64_t n, Block<R> tile,
              Block<R> scratch) {
  load_rows(x, place, channel, n, scratch);
  for (int i = 0; i < place.count; ++i) {
    R* sum = tile.row(i);
    const R* add = scratch.row(i);
    for (int64_t c = 0; c < n; ++c) sum[c] += add[c];
  }
}

template <class R>
Block<R> take_tile(const Problem& p, Scratch& scratch) {
  return {scratch.take<R>(p.tile_rows() * p.pitch()), p.pitch()};
}

// A parameter of all channels in the compute type; null if absent.
template <class R>
const R* load_parameter(const View<1>& x, int64_t dim, Scratch& scratch) {
  R* row = scratch.take<R>(dim);
  if (!x) return nullptr;
  with_type(x.dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(x.data);
    if (x.stride[0] == 1) return load_row<R>(from, dim, row);
    for (int64_t c = 0; c < dim; ++c) row[c] = load_one<R>(from + c * x.stride[0]);
  });
  return row;
}

// The norm of a group of n channels, and its parameters there.
template <class R>
struct Norm {
  int64_t n;
  R eps;
  bool subtract_mean;
  const R *weight, *bias;  // or null

  template <class Count>
  STATESCAN_INLINE Vec<R> scale(Vec<R> v, int64_t c, Count count) const {
    return weight ? v * load_part<R>(weight + c, count) : v;
  }
  template <class Count>
  STATESCAN_INLINE Vec<R> output(Vec<R> xhat, int64_t c, Count count) const {
    const Vec<R> y = scale(xhat, c, count);
    return bias ? y + load_part<R>(bias + c, count) : y;
  }
  R rstd(R sum_of_squares) const { return 1 / std::sqrt(sum_of_squares / R(n) + eps); }
};

template <class R>
STATESCAN_INLINE Norm<R> norm_at(const Problem& p, int64_t channel, const R* weight,
                                 const R* bias) {
  return {p.group_size, R(p.eps), p.subtract_mean, weight ? weight + channel : nullptr,
          bias ? bias + channel : nullptr};
}

// Calls f(gate tag).
template <class F>
STATESCAN_INLINE void with_gate(Gate gate, F&& f) {
  switch (gate) {
    case Gate::kNone: return f(std::integral_constant<Gate, Gate::kNone>{});
    case Gate::kBefore: return f(std::integral_constant<Gate, Gate::kBefore>{});
    case Gate::kAfter: return f(std::integral_constant<Gate, Gate::kAfter>{});
  }
}

// Calls f(null pointer of the type that the rows have in place), if R computes it.
template <class R, class F>
STATESCAN_INLINE void with_rows_type(DType dtype, F&& f) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, double> == std::is_same_v<R, double>) f(type);
  });
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::gated_rms_norm
