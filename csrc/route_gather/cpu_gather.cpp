#include <algorithm>

#include "common/bits.h"
#include "common/scratch.h"
#include "common/stream.h"
#include "route_gather/kernels.h"

namespace statescan::route_gather {
namespace STATESCAN_ISA {
namespace {

// A row is one vector: the channels of a token side by side, 16-bit ones in pairs in a lane.
template <class E>
inline constexpr int kPack = int(sizeof(Lane<E>) / sizeof(E));
template <class E>
inline constexpr int kWidth = kLanes<Lane<E>> * kPack<E>;

// One side's elements as it has them: (channel, token or step).
template <class E>
struct Channels {
  E* data;
  int64_t channel_stride, time_stride;
};

// Lane i of a block of rows, transposed: channels kPack * i and on, in consecutive steps.
template <class E>
STATESCAN_INLINE Vec<Lane<E>> load_packed(const E* const* channels, int64_t t) {
  if constexpr (kPack<E> == 1) return load_bits(channels[0] + t);
  if constexpr (kPack<E> == 2) {
    return load_bits(channels[0] + t) | load_bits(channels[1] + t) << 16;
  }
}

// Tokens from channels into rows.
template <class E>
void transpose_tokens(const Channels<const E>& x, int channels, int64_t length, E* rows) {
  constexpr int lanes = kLanes<Lane<E>>;
  const E* channel[kWidth<E>];  // what is beyond the last one is never looked at
  for (int c = 0; c < kWidth<E>; ++c) {
    channel[c] = x.data + (c < channels ? c : 0) * x.channel_stride;
  }
  for (int64_t t = 0; t < length; t += lanes) {
    const int64_t begin = std::min(t, length - lanes);  // the last block overlaps
    Vec<Lane<E>> v[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = load_packed<E>(channel + i * kPack<E>, begin);
    transpose<Lane<E>>(v);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      memcpy(rows + (begin + i) * kWidth<E>, &v[i], sizeof(v[i]));
    }
  }
}

template <class E>
void keep_tokens(const Channels<const E>& x, int channels, int64_t length, E* rows) {
  if (x.time_stride == 1 && length >= kLanes<Lane<E>>) {
    return transpose_tokens(x, channels, length, rows);
  }
  for (int64_t t = 0; t < length; ++t) {
    const E* from = x.data + t * x.time_stride;
    for (int c = 0; c < channels; ++c) rows[t * kWidth<E> + c] = from[c * x.channel_stride];
  }
}

template <class E>
STATESCAN_INLINE Vec<Lane<E>> row_of(const E* rows, int64_t pitch, int32_t token) {
  return token >= 0 ? load_as<Vec<Lane<E>>>(rows + token * pitch) : Vec<Lane<E>>{};
}

// Steps [0, steps) of a stretch, transposed back: buffer[c * kStretch + t]. Whole vectors are
// written, beyond the last step too.
template <class E>
void gather_stretch(const E* rows, int64_t pitch, const int32_t* index, int64_t steps, E* buffer) {
  constexpr int lanes = kLanes<Lane<E>>;
  for (int64_t t = 0; t < steps; t += lanes) {
    const int count = int(std::min<int64_t>(lanes, steps - t));
    Vec<Lane<E>> v[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = row_of(rows, pitch, i < count ? index[t + i] : -1);
    transpose<Lane<E>>(v);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      E* to = buffer + i * kPack<E> * GatherParams::kStretch + t;
      store_bits(to, v[i]);
      if constexpr (kPack<E> == 2) store_bits(to + GatherParams::kStretch, v[i] >> 16);
    }
  }
}

template <class E>
void gather_to_channels(const E* rows, int64_t pitch, const int32_t* index, int64_t steps,
                        int channels, const Channels<E>& y, E* buffer, bool stream) {
  constexpr int64_t stretch = GatherParams::kStretch;
  for (int64_t t = 0; t < steps; t += stretch) {
    const int64_t some = std::min(stretch, steps - t), bytes = some * int64_t(sizeof(E));
    gather_stretch(rows, pitch, index + t, some, buffer);
    for (int c = 0; c < channels; ++c) {
      E* to = y.data + c * y.channel_stride + t;
      stream ? stream_copy(to, buffer + c * stretch, bytes)
             : (void)memcpy(to, buffer + c * stretch, bytes);
    }
  }
}

template <class E>
void gather_to_rows(const E* rows, int64_t pitch, const int32_t* index, int64_t steps, int channels,
                    const Channels<E>& y) {
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<Lane<E>> row = row_of(rows, pitch, index[t]);
    E* to = y.data + t * y.time_stride;
    channels == kWidth<E> ? (void)memcpy(to, &row, sizeof(row))
                          : (void)memcpy(to, &row, channels * sizeof(E));
  }
}

template <class E>
Channels<E> channels_of(const View<4>& x, int64_t b, int64_t k, int64_t d) {
  using T = std::remove_const_t<E>;
  return {static_cast<T*>(x.data) + b * x.stride[0] + k * x.stride[1] + d * x.stride[2],
          x.stride[2], x.stride[3]};
}

// Up to kWidth channels from d on, of all routes.
template <class E>
void gather_width(const GatherParams& p, int64_t b, int64_t d, int channels, Scratch scratch) {
  E* kept = scratch.take<E>(p.length * kWidth<E>);
  E* buffer = scratch.take<E>(GatherParams::kStretch * kWidth<E>);
  const bool in_place = p.tokens.stride[2] == 1 && channels == kWidth<E>;
  for (int64_t k = 0; k < p.count; ++k) {
    const auto x = channels_of<const E>(p.tokens, b, k, d);
    const auto y = channels_of<E>(p.stack, b, k, d);
    if (!in_place && (k == 0 || p.tokens.stride[1] != 0)) {
      keep_tokens(x, channels, p.length, kept);
    }
    const E* rows = in_place ? x.data : kept;
    const int64_t pitch = in_place ? x.time_stride : kWidth<E>;
    const int32_t* index = p.index + b * p.index_stride + k * p.steps;
    if (y.time_stride == 1) {
      gather_to_channels(rows, pitch, index, p.steps, channels, y, buffer, p.stream);
    } else {
      gather_to_rows(rows, pitch, index, p.steps, channels, y);
    }
  }
}

// A few channels: transposing would move mostly nothing.
template <class E>
void gather_one(const GatherParams& p, int64_t b, int64_t d) {
  for (int64_t k = 0; k < p.count; ++k) {
    const auto x = channels_of<const E>(p.tokens, b, k, d);
    const auto y = channels_of<E>(p.stack, b, k, d);
    const int32_t* index = p.index + b * p.index_stride + k * p.steps;
    for (int64_t t = 0; t < p.steps; ++t) {
      y.data[t * y.time_stride] = index[t] >= 0 ? x.data[index[t] * x.time_stride] : E(0);
    }
  }
}

template <class E>
void gather_block(const GatherParams& p, int64_t b, int64_t d, int64_t end, void* scratch) {
  for (; d < end; d += kWidth<E>) {
    const int channels = int(std::min<int64_t>(kWidth<E>, end - d));
    if (4 * channels > kWidth<E>) {
      gather_width<E>(p, b, d, channels, Scratch(scratch));
    } else {
      for (int c = 0; c < channels; ++c) gather_one<E>(p, b, d + c);
    }
  }
}

}  // namespace

void gather(const GatherParams& p, const Range& range) {
  for (int64_t task = range.begin; task < range.end; ++task) {
    const int64_t b = task / p.blocks(), d = task % p.blocks() * Problem::kChannels;
    const int64_t end = std::min(d + Problem::kChannels, p.dim);
    with_bits(p.tokens.dtype, [&](auto* type) {
      gather_block<std::remove_pointer_t<decltype(type)>>(p, b, d, end, range.scratch);
    });
  }
  if (p.stream) end_stream();
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::route_gather
