#include <algorithm>

#include "common/scratch.h"
#include "common/tile.h"
#include "route_gather/kernels.h"

namespace statescan::route_gather {
namespace STATESCAN_ISA {
namespace {

// Copies change no value: half precision goes as bfloat16, which is as wide and cheaper to convert.
View<4> as_bits(View<4> x) {
  if (x.dtype == DType::kFloat16) x.dtype = DType::kBFloat16;
  return x;
}

// The rows that a task chooses from: of each token its channels, side by side.
template <class T>
struct Rows {
  const T* data;
  int64_t pitch;
};

template <class R, class U>
STATESCAN_INLINE void store_some(U* to, Vec<R> v, int count) {
  if (count == kLanes<R>) return store_convert<R>(to, v);
  R values[kLanes<R>];
  store(values, v);
  for (int i = 0; i < count; ++i) store_one<R>(to + i, values[i]);
}

// One route of one block: `lanes` steps at a time, transposed in registers.
template <class R, class T, class U>
void gather_to_channels(const Rows<T>& x, const int32_t* index, int64_t steps, int channels, U* y,
                        int64_t channel_stride) {
  constexpr int lanes = kLanes<R>;
  int64_t t = 0;
  while (t < steps) {
    // The last block overlaps the one before it.
    const int64_t begin = t + lanes <= steps ? t : std::max<int64_t>(steps - lanes, 0);
    const int count = int(std::min<int64_t>(lanes, steps - begin));
    Vec<R> v[lanes];
    for (int i = 0; i < lanes; ++i) {
      const int64_t token = i < count ? index[begin + i] : -1;
      v[i] = token >= 0 ? load_convert<R>(x.data + token * x.pitch) : Vec<R>{};
    }
    transpose<R>(v);
    for (int c = 0; c < channels; ++c) {
      U* to = y + c * channel_stride + begin;
      store_some<R>(to, v[c], count);
    }
    t = begin + lanes;
  }
}

template <class R, class T, class U>
void gather_to_rows(const Rows<T>& x, const int32_t* index, int64_t steps, int channels, U* y,
                    int64_t time_stride) {
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<R> v = index[t] >= 0 ? load_convert<R>(x.data + index[t] * x.pitch) : Vec<R>{};
    U* to = y + t * time_stride;
    store_some<R>(to, v, channels);
  }
}

// Up to kLanes channels from d on, of all routes.
template <class R>
void gather_lanes(const GatherParams& p, int64_t b, int64_t d, int channels, Scratch scratch) {
  const View<4> tokens = as_bits(p.tokens), stack = as_bits(p.stack);
  R* kept = scratch.take<R>((p.length + 1) * kLanes<R>);
  const bool in_place = tokens.stride[2] == 1 && channels == kLanes<R>;
  for (int64_t k = 0; k < p.count; ++k) {
    const Plane x = Plane{tokens.data, tokens.dtype, tokens.stride[2], tokens.stride[3]}.shifted(
        b * tokens.stride[0] + k * tokens.stride[1] + d * tokens.stride[2]);
    if (!in_place && (k == 0 || tokens.stride[1] != 0)) {
      load_tile<R>(x, channels, int(p.length), kept, kLanes<R>);
    }
    const int32_t* index = p.index + b * p.index_stride + k * p.steps;
    const int64_t at = b * stack.stride[0] + k * stack.stride[1] + d * stack.stride[2];
    with_type(stack.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* y = static_cast<T*>(stack.data) + at;
      const auto gather_from = [&](const auto& rows) {
        if (stack.stride[3] == 1) {
          gather_to_channels<R>(rows, index, p.steps, channels, y, stack.stride[2]);
        } else {
          gather_to_rows<R>(rows, index, p.steps, channels, y, stack.stride[3]);
        }
      };
      if (in_place) {
        gather_from(Rows<T>{static_cast<const T*>(x.data), x.time_stride});
      } else {
        gather_from(Rows<R>{kept, kLanes<R>});
      }
    });
  }
}

// A few channels: transposing would move mostly nothing.
template <class T>
void gather_one(const GatherParams& p, int64_t b, int64_t d) {
  for (int64_t k = 0; k < p.count; ++k) {
    const int64_t *from = p.tokens.stride, *to = p.stack.stride;
    const int32_t* index = p.index + b * p.index_stride + k * p.steps;
    const T* x = static_cast<const T*>(p.tokens.data) + b * from[0] + k * from[1] + d * from[2];
    T* y = static_cast<T*>(p.stack.data) + b * to[0] + k * to[1] + d * to[2];
    for (int64_t t = 0; t < p.steps; ++t) {
      y[t * to[3]] = index[t] >= 0 ? x[index[t] * from[3]] : T{};
    }
  }
}

template <class R>
void gather_block(const GatherParams& p, int64_t b, int64_t d, int channels, void* scratch) {
  for (int64_t end = d + channels; d < end; d += kLanes<R>) {
    const int count = int(std::min<int64_t>(kLanes<R>, end - d));
    if (4 * count > kLanes<R>) {
      gather_lanes<R>(p, b, d, count, Scratch(scratch));
      continue;
    }
    for (int c = 0; c < count; ++c) {
      with_type(p.stack.dtype, [&](auto* type) {
        gather_one<std::remove_pointer_t<decltype(type)>>(p, b, d + c);
      });
    }
  }
}

}  // namespace

void gather(const GatherParams& p, const Range& range) {
  for (int64_t task = range.begin; task < range.end; ++task) {
    const int64_t b = task / p.blocks(), d = task % p.blocks() * Problem::kChannels;
    const int channels = int(std::min(Problem::kChannels, p.dim - d));
    p.compute == DType::kFloat64 ? gather_block<double>(p, b, d, channels, range.scratch)
                                 : gather_block<float>(p, b, d, channels, range.scratch);
  }
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::route_gather
