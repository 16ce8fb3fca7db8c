#include <algorithm>

#include "common/scratch.h"
#include "common/tile.h"
#include "route_gather/kernels.h"

namespace statescan::route_gather {
namespace STATESCAN_ISA {
namespace {

// sums[index[t]] += rows[t], in order of time.
template <class R, class T>
STATESCAN_INLINE void add_rows(const T* rows, int64_t pitch, const int32_t* index, int64_t steps,
                               R* sums) {
  for (int64_t t = 0; t < steps; ++t) {
    if (index[t] < 0) continue;
    R* sum = sums + index[t] * kLanes<R>;
    store(sum, load(sum) + load_convert<R>(rows + t * pitch));
  }
}

// Of a block of steps, one in each vector: sums[index[i]] += v[i].
template <class R>
STATESCAN_INLINE void add_steps(const Vec<R>* v, const int32_t* index, R* sums) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<R>; ++i) {
    if (index[i] < 0) continue;
    R* sum = sums + index[i] * kLanes<R>;
    store(sum, load(sum) + v[i]);
  }
}

constexpr int64_t kAheadBytes = 512;  // that a channel is asked for ahead of its use

// The same from kLanes channels, in whole blocks of steps, which are transposed in registers; returns
// how many steps that was. Channels lie too far apart for the hardware to follow them all.
template <class R, class T>
int64_t add_blocks(const T* y, int64_t channel_stride, const int32_t* index, int64_t steps,
                   R* sums) {
  constexpr int lanes = kLanes<R>;
  constexpr bool kPairs = std::is_same_v<T, BFloat16> && std::is_same_v<R, float>;
  constexpr int block = kPairs ? 2 * lanes : lanes;
  int64_t t = 0;
  for (; t + block <= steps; t += block) {
    const auto channel = [&](int c) {
      const T* from = y + c * channel_stride + t;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
      return from;
    };
    if constexpr (kPairs) {  // two steps share a lane, and each is half of a float32
      Vec<uint32_t> v[lanes];
#pragma GCC unroll 16
      for (int c = 0; c < lanes; ++c) v[c] = load_as<Vec<uint32_t>>(channel(c));
      transpose<uint32_t>(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const Vec<R> two[] = {(Vec<R>)(v[i] << 16), (Vec<R>)(v[i] & 0xffff0000u)};
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const int32_t token = index[t + 2 * i + j];
          if (token < 0) continue;
          store(sums + token * lanes, load(sums + token * lanes) + two[j]);
        }
      }
    } else {
      Vec<R> v[lanes];
#pragma GCC unroll 16
      for (int c = 0; c < lanes; ++c) v[c] = load_convert<R>(channel(c));
      transpose<R>(v);
      add_steps<R>(v, index + t, sums);
    }
  }
  return t;
}

Plane plane_of(const View<4>& x, int64_t b, int64_t k, int64_t d) {
  return Plane{x.data, x.dtype, x.stride[2], x.stride[3]}.shifted(
      b * x.stride[0] + k * x.stride[1] + d * x.stride[2]);
}

template <class R>
void add_route(const ScatterParams& p, const Plane& y, const int32_t* index, int channels, R* tile,
               R* sums) {
  if (y.row_stride == 1 && channels == kLanes<R>) {
    with_type(y.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      add_rows<R, T>(static_cast<const T*>(y.data), y.time_stride, index, p.steps, sums);
    });
    return;
  }
  int64_t done = 0;
  if (y.time_stride == 1 && channels == kLanes<R>) {
    with_type(y.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      done = add_blocks<R, T>(static_cast<const T*>(y.data), y.row_stride, index, p.steps, sums);
    });
  }
  for (int64_t t = done; t < p.steps; t += ScatterParams::kTile) {
    const int steps = int(std::min(ScatterParams::kTile, p.steps - t));
    load_tile<R>(y.at(0, t), channels, steps, tile, kLanes<R>);
    add_rows<R, R>(tile, kLanes<R>, index + t, steps, sums);
  }
}

template <class R>
void scale_rows(const float* scale, int64_t length, R* sums) {
  for (int64_t l = 0; l < length; ++l) {
    store(sums + l * kLanes<R>, load(sums + l * kLanes<R>) * R(scale[l]));
  }
}

// Up to kLanes channels from d on: their sums of all tokens lie in scratch.
template <class R>
void scatter_lanes(const ScatterParams& p, int64_t b, int64_t d, int channels, Scratch scratch) {
  R* tile = scratch.take<R>(ScatterParams::kTile * kLanes<R>);
  R* sums = scratch.take<R>(p.length * kLanes<R>);
  for (int64_t k = 0; k < p.count; ++k) {
    if (k == 0 || !p.sum) std::fill_n(sums, p.length * kLanes<R>, R(0));
    const int32_t* index = p.index + b * p.index_stride + k * p.steps;
    add_route<R>(p, plane_of(p.stack, b, k, d), index, channels, tile, sums);
    if (p.sum && k + 1 < p.count) continue;
    if (p.scale != nullptr) scale_rows(p.scale + b * p.scale_stride, p.length, sums);
    const Plane out = plane_of(p.tokens, b, p.sum ? 0 : k, d);
    store_tile<R>(out, channels, int(p.length), sums, kLanes<R>);
  }
}

// A few channels: one at a time.
template <class R>
void scatter_one(const ScatterParams& p, int64_t b, int64_t d, Scratch scratch) {
  R* sums = scratch.take<R>(p.length);
  for (int64_t k = 0; k < p.count; ++k) {
    if (k == 0 || !p.sum) std::fill_n(sums, p.length, R(0));
    const int32_t* index = p.index + b * p.index_stride + k * p.steps;
    const Plane y = plane_of(p.stack, b, k, d);
    with_type(y.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* from = static_cast<const T*>(y.data);
      for (int64_t t = 0; t < p.steps; ++t) {
        if (index[t] >= 0) sums[index[t]] += load_one<R>(from + t * y.time_stride);
      }
    });
    if (p.sum && k + 1 < p.count) continue;
    const float* scale = p.scale == nullptr ? nullptr : p.scale + b * p.scale_stride;
    for (int64_t l = 0; scale != nullptr && l < p.length; ++l) sums[l] *= R(scale[l]);
    store_tile<R>(plane_of(p.tokens, b, p.sum ? 0 : k, d), 1, int(p.length), sums, 1);
  }
}

template <class R>
void scatter_block(const ScatterParams& p, int64_t b, int64_t d, int channels, void* scratch) {
  for (int64_t end = d + channels; d < end; d += kLanes<R>) {
    const int count = int(std::min<int64_t>(kLanes<R>, end - d));
    if (4 * count > kLanes<R>) {
      scatter_lanes<R>(p, b, d, count, Scratch(scratch));
    } else {
      for (int c = 0; c < count; ++c) scatter_one<R>(p, b, d + c, Scratch(scratch));
    }
  }
}

}  // namespace

void scatter(const ScatterParams& p, const Range& range) {
  for (int64_t task = range.begin; task < range.end; ++task) {
    const int64_t b = task / p.blocks(), d = task % p.blocks() * Problem::kChannels;
    const int channels = int(std::min(Problem::kChannels, p.dim - d));
    p.compute == DType::kFloat64 ? scatter_block<double>(p, b, d, channels, range.scratch)
                                 : scatter_block<float>(p, b, d, channels, range.scratch);
  }
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::route_gather
