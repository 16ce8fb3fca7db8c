// Decode steps of the short convolution on the CPU, and states for them out of packed sequences.
// Lanes are channels: a vector of channels and the few inputs that its outputs need make a small
// tile.
#include "causal_conv1d/cpu_walk.h"

namespace statescan::causal_conv1d {
namespace STATESCAN_ISA {
namespace {

template <class V, int... kLane>
STATESCAN_INLINE void unzip(V a, V b, V& even, V& odd, std::integer_sequence<int, kLane...>) {
  even = shuffle(a, b, std::integer_sequence<int, (2 * kLane)...>{});
  odd = shuffle(a, b, std::integer_sequence<int, (2 * kLane + 1)...>{});
}

template <class V, int... kLane>
STATESCAN_INLINE void zip(V a, V b, V& low, V& high, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane);
  low = shuffle(a, b, std::integer_sequence<int, (kLane / 2 + kLane % 2 * n)...>{});
  high = shuffle(a, b, std::integer_sequence<int, (n / 2 + kLane / 2 + kLane % 2 * n)...>{});
}

// Four vectors of rows of four, as four vectors of columns.
template <class R, class T>
STATESCAN_INLINE void load_by_four(const T* from, Vec<R> (&column)[4]) {
  constexpr int n = kLanes<R>;
  const std::make_integer_sequence<int, n> lanes;
  Vec<R> v[4], even[2], odd[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = load_convert<R>(from + i * n);
  unzip(v[0], v[1], even[0], odd[0], lanes);
  unzip(v[2], v[3], even[1], odd[1], lanes);
  unzip(even[0], even[1], column[0], column[2], lanes);
  unzip(odd[0], odd[1], column[1], column[3], lanes);
}

template <class R, class T>
STATESCAN_INLINE void store_by_four(T* to, const Vec<R> (&column)[4]) {
  constexpr int n = kLanes<R>;
  const std::make_integer_sequence<int, n> lanes;
  Vec<R> v[4], even[2], odd[2];
  zip(column[0], column[2], even[0], even[1], lanes);
  zip(column[1], column[3], odd[0], odd[1], lanes);
  zip(even[0], odd[0], v[0], v[1], lanes);
  zip(even[1], odd[1], v[2], v[3], lanes);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) store_convert<R>(to + i * n, v[i]);
}

// Calls f(null pointer of the storage type), which is not double: then all is computed in double.
template <class F>
STATESCAN_INLINE void with_short_type(DType dtype, F&& f) {
  with_type(dtype, [&](auto* type) {
    if constexpr (!std::is_same_v<decltype(type), double*>) f(type);
  });
}

template <class R>
class Update {
 public:
  Update(const UpdateParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    filter_ = scratch.take<R>((p.width + 1) * p.kChannels);
    in_ = scratch.take<R>((std::max(p.state_len, p.width) + p.tokens) * kLanes<R>);
    y_ = scratch.take<R>(p.tokens * kLanes<R>);
    by_four_ = p.tokens == 1 && p.width == 4 && p.state_len == 4 && p.state.stride[1] == 4 &&
               p.state.stride[2] == 1 && p.x.stride[1] == 1 && p.y.stride[1] == 1;
  }

  void run(int64_t task) {
    const int64_t begin = task % p_.blocks() * p_.kChannels;
    const int64_t end = std::min(begin + p_.kChannels, p_.dim);
    const int64_t first = task / p_.blocks() * p_.kElements;
    const int64_t last = std::min(first + p_.kElements, p_.batch);
    for (int64_t c = begin; c < end; c += kLanes<R>) {
      load_filter(c, rows_at(c, end), taps_at(c - begin));
    }
    for (int64_t b = first; b < last; ++b) {
      const int64_t slot = p_.slot_of == nullptr ? b : p_.slot_of[b];
      const int64_t quick = slot >= 0 && by_four_ ? run_by_four(b, slot, begin, end) : begin;
      for (int64_t c = quick; c < end; c += kLanes<R>) {
        const int rows = rows_at(c, end);
        if (slot < 0) {
          clear(y_, p_.tokens * kLanes<R>);
        } else if (p_.positions == nullptr) {
          shift(b, slot, c, rows, taps_at(c - begin));
        } else {
          turn(b, slot, c, rows, taps_at(c - begin));
        }
        store_tile(plane(p_.y, b, c, 0), rows, int(p_.tokens), y_, kLanes<R>);
      }
    }
  }

 private:
  static int rows_at(int64_t channel, int64_t end) {
    return int(std::min<int64_t>(kLanes<R>, end - channel));
  }
  // (width + 1, lane) for each vector of the block's channels
  R* taps_at(int64_t channel) const { return filter_ + channel * (p_.width + 1); }

  void load_filter(int64_t channel, int rows, R* taps) {
    const Plane weight{p_.weight.data, p_.weight.dtype, p_.weight.stride[0], p_.weight.stride[1]};
    const Plane from = weight.at(channel, 0);
    const bool quick =
        p_.width == 4 && rows == kLanes<R> && from.row_stride == 4 && from.time_stride == 1;
    if (quick) {
      with_type(from.dtype, [&](auto* type) {
        Vec<R> column[4];
        load_by_four<R>(static_cast<decltype(type)>(from.data), column);
        for (int k = 0; k < 4; ++k) store(taps + k * kLanes<R>, column[k]);
      });
    } else {
      load_tile(from, rows, int(p_.width), taps, kLanes<R>);
    }
    R* bias = taps + p_.width * kLanes<R>;
    clear(bias, kLanes<R>);
    if (!p_.bias) return;
    const Plane from_bias{p_.bias.data, p_.bias.dtype, p_.bias.stride[0], 0};
    load_tile(from_bias.at(channel, 0), rows, 1, bias, kLanes<R>);
  }

  // The usual case, in registers: one token, width 4, and a state of four neighbouring inputs for
  // each channel. Returns the first channel left to do.
  int64_t run_by_four(int64_t b, int64_t slot, int64_t begin, int64_t end) {
    int64_t next = begin;
    if constexpr (std::is_same_v<R, float>) {
      with_short_type(p_.state.dtype, [&](auto* state_type) {
        with_short_type(p_.x.dtype, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          auto* state = static_cast<decltype(state_type)>(plane(p_.state, slot, begin, 0).data);
          next = p_.positions == nullptr ? step_by_four<T, false>(b, state, begin, end)
                                         : step_by_four<T, true>(b, state, begin, end);
        });
      });
    }
    return next;
  }

  // kTurns: the state is circular, the newest input takes the place of the oldest.
  template <class T, bool kTurns, class S>
  int64_t step_by_four(int64_t b, S* state, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(p_.x.data) + b * p_.x.stride[0];
    T* y = static_cast<T*>(p_.y.data) + b * p_.y.stride[0];
    const int newest = kTurns ? int(p_.positions[b] & 3) : 3;
    int64_t c = begin;
    for (; c + kLanes<R> <= end; c += kLanes<R>, state += 4 * kLanes<R>) {
      const R* taps = taps_at(c - begin);
      Vec<R> in[4];
      load_by_four<R>(state, in);
      // The oldest, in[0] or in[newest], is not seen.
      if constexpr (!kTurns) in[0] = in[1], in[1] = in[2], in[2] = in[3];
      in[newest] = load_convert<R>(x + c);
      Vec<R> sum = load(taps + 4 * kLanes<R>);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum += load(taps + k * kLanes<R>) * in[(newest + 1 + k) & 3];
      store_convert<R>(y + c, activate(sum, p_.silu));
      store_by_four<R>(state, in);
    }
    return c;
  }

  // y of all tokens; in[0] is the first input that the first of them sees.
  void filter(const R* in, const R* taps) {
    const int64_t width = p_.width;
    for (int64_t j = 0; j < p_.tokens; ++j) {
      Vec<R> sum = load(taps + width * kLanes<R>);
      for (int64_t k = 0; k < width; ++k) {
        sum += load(taps + k * kLanes<R>) * load(in + (j + k) * kLanes<R>);
      }
      store(y_ + j * kLanes<R>, activate(sum, p_.silu));
    }
  }

  // The state holds the last state_len inputs in order.
  void shift(int64_t b, int64_t slot, int64_t channel, int rows, const R* taps) {
    const Plane state = plane(p_.state, slot, channel, 0);
    load_tile(state, rows, int(p_.state_len), in_, kLanes<R>);
    load_tile(plane(p_.x, b, channel, 0), rows, int(p_.tokens), in_ + p_.state_len * kLanes<R>,
              kLanes<R>);
    filter(in_ + (p_.state_len - (p_.width - 1)) * kLanes<R>, taps);
    store_tile(state, rows, int(p_.state_len), in_ + p_.tokens * kLanes<R>, kLanes<R>);
  }

  // Input number t of the sequence is at t % state_len of the state.
  void turn(int64_t b, int64_t slot, int64_t channel, int rows, const R* taps) {
    const int64_t position = p_.positions[b], history = p_.width - 1;
    auto entry = [&](int64_t t) {
      const int64_t at = t % p_.state_len;
      return plane(p_.state, slot, channel, at < 0 ? at + p_.state_len : at);
    };
    for (int64_t i = 0; i < history; ++i) {
      load_tile(entry(position - history + i), rows, 1, in_ + i * kLanes<R>, kLanes<R>);
    }
    R* x = in_ + history * kLanes<R>;
    load_tile(plane(p_.x, b, channel, 0), rows, int(p_.tokens), x, kLanes<R>);
    filter(in_, taps);
    for (int64_t j = std::max<int64_t>(0, p_.tokens - p_.state_len); j < p_.tokens; ++j) {
      store_tile(entry(position + j), rows, 1, x + j * kLanes<R>, kLanes<R>);
    }
  }

  const UpdateParams& p_;
  bool by_four_;
  R *filter_, *in_, *y_;  // (vector, tap, lane), (step, lane), (step, lane)
};

template <class R>
void run_update(const UpdateParams& p, const Range& range) {
  Update<R> update(p, range.scratch);
  for (int64_t task = range.begin; task < range.end; ++task) update.run(task);
}

template <class R>
void copy_states(const VarlenStatesParams& p, const Range& range) {
  R* tile = static_cast<R*>(range.scratch);
  for (int64_t task = range.begin; task < range.end; ++task) {
    const int64_t slot = task / p.blocks(), channel = task % p.blocks() * kTile;
    const Segment& segment = (*p.segments)[slot];
    const int rows = int(std::min<int64_t>(kTile, p.dim - channel));
    for (int64_t at = 0; at < p.state_len; at += kTile) {
      const int count = int(std::min<int64_t>(kTile, p.state_len - at));
      const int64_t t = segment.end - p.state_len + at;
      const int absent = int(std::clamp<int64_t>(segment.begin - t, 0, count));
      clear(tile, absent * kTile);
      if (absent < count) {
        load_tile(plane(p.x, 0, channel, t + absent), rows, count - absent, tile + absent * kTile,
                  kTile);
      }
      store_tile(plane(p.states, slot, channel, at), rows, count, tile, kTile);
    }
  }
}

}  // namespace

void update(const UpdateParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return run_update<double>(p, range);
  run_update<float>(p, range);
}

void varlen_states(const VarlenStatesParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return copy_states<double>(p, range);
  copy_states<float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::causal_conv1d
