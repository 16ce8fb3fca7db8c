// What the forward and the backward of the CPU convolution share: the padded sequence, the channels
// of a task, and tiles of both.
//
// The bulk of a sequence is read and written in place, in its own type (strips of channels, or
// rows of time steps, see Layout). The first and the last few steps of a sequence, which see the
// padding, and operands of any other layout go through tiles; the arithmetic is the same function
// either way.
#pragma once

#include <algorithm>

#include "common/scratch.h"
#include "common/tile.h"
#include "common/vector_math.h"
// after the mathematics that it uses
#include "causal_conv1d/equations.h"
#include "causal_conv1d/kernels.h"

namespace statescan::causal_conv1d {
namespace STATESCAN_ISA {

inline constexpr int kTile = 64;  // channels and steps of a tile: 16 KiB of floats

// The filter from one channel on: tap k of lane c is taps[k * pitch + c], the bias tap `width`.
template <class R>
struct Filter {
  const R* taps;
  int64_t pitch;
  int width;
  bool silu;

  STATESCAN_INLINE const R* tap(int k) const { return taps + k * pitch; }
};

template <class R>
STATESCAN_INLINE Filter<R> filter_at(const Problem& p, int64_t channel) {
  return {static_cast<const R*>(p.filter) + channel, p.filter_pitch(), int(p.width), p.silu};
}

template <class T>
STATESCAN_INLINE T* element(const View<3>& x, int64_t b, int64_t channel, int64_t t) {
  return static_cast<T*>(x.data) + b * x.stride[0] + channel * x.stride[1] + t * x.stride[2];
}

// Calls f(width tag): the number of taps, or 0 for a loop over them.
template <class R, class F>
STATESCAN_INLINE void with_width(int64_t width, F&& f) {
  if constexpr (std::is_same_v<R, float>) {  // double serves gradient checks
    switch (width) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 3: return f(std::integral_constant<int, 3>{});
      case 4: return f(std::integral_constant<int, 4>{});
      case 5: return f(std::integral_constant<int, 5>{});
      case 6: return f(std::integral_constant<int, 6>{});
      case 7: return f(std::integral_constant<int, 7>{});
      case 8: return f(std::integral_constant<int, 8>{});
    }
  }
  f(std::integral_constant<int, 0>{});
}

// Calls f(null pointer of the storage type, width tag); the fast layouts have few of each.
template <class F>
STATESCAN_INLINE void with_storage_and_width(DType dtype, int64_t width, F&& f) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<T, double>) {
      with_width<float>(width, [&](auto w) {
        if constexpr (w() > 0) f(type, w);
      });
    }
  });
}

// Calls f(first channel, channels) for the whole vectors of [begin, end), then for what is left:
// once more the last whole vector's worth of channels. Those that come twice get the same values
// twice. Only where there is no whole vector does f see fewer channels than lanes.
template <class R, class F>
STATESCAN_INLINE void for_spans(int64_t begin, int64_t end, F&& f) {
  const int64_t whole = (end - begin) / kLanes<R> * kLanes<R>;
  if (whole > 0) f(begin, int(whole));
  if (begin + whole == end) return;
  if (whole > 0) {
    f(end - kLanes<R>, kLanes<R>);
  } else {
    f(begin, int(end - begin));
  }
}

template <class R>
STATESCAN_INLINE int round_to_lanes(int64_t count) {
  return int((count + kLanes<R> - 1) / kLanes<R> * kLanes<R>);
}

template <class R>
STATESCAN_INLINE void clear(R* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = 0;
}

// A segment as a padded sequence (equations.h), with the tensors it consists of.
struct Sequence {
  const Problem& p;
  const Segment& segment;
  const View<3>& x;
  const View<3>& state;  // absent: the padding is zero

  int64_t length() const { return segment.end - segment.begin; }
  // The time step of padded position `position`.
  int64_t time(int64_t position) const { return segment.begin + position - p.left(); }

  // tile[(i, row)] = padded[row, begin + i], i < count; 0 beyond the padding.
  template <class R>
  void load(int64_t channel, int rows, int64_t begin, int count, R* tile, int pitch) const {
    const int64_t left = p.left(), end = begin + count;
    const bool has_state = state && segment.initial_slot >= 0;
    int64_t at = begin;
    auto until = [&](int64_t to, bool present, auto&& source) {
      to = std::min(to, end);
      if (to <= at) return;
      R* out = tile + (at - begin) * pitch;
      if (present) {
        load_tile(source(), rows, int(to - at), out, pitch);
      } else {
        clear(out, (to - at) * pitch);
      }
      at = to;
    };
    auto from_state = [&] {
      return plane(state, segment.initial_slot, channel, at < left ? at : at - left - length());
    };
    until(left, has_state, from_state);
    until(left + length(), true, [&] { return plane(x, segment.batch, channel, time(at)); });
    until(p.width - 1 + length(), has_state, from_state);
    until(end, false, from_state);
  }
};

// x[channels, begin .. end) = 0
template <class R>
void store_zeros(const View<3>& x, int64_t b, int64_t channel, int64_t channel_end, int64_t begin,
                 int64_t end, R* tile) {
  clear(tile, kTile * kTile);
  for (int64_t t = begin; t < end; t += kTile) {
    for (int64_t c = channel; c < channel_end; c += kTile) {
      store_tile(plane(x, b, c, t), int(std::min<int64_t>(kTile, channel_end - c)),
                 int(std::min<int64_t>(kTile, end - t)), tile, kTile);
    }
  }
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::causal_conv1d
