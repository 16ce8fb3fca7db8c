// Decode steps of the short convolution on the CPU, and states for them out of packed sequences.
// Lanes are channels: a vector of channels and the few inputs that its outputs need fit a small tile.
#include "causal_conv1d/cpu_walk.h"

namespace statescan::causal_conv1d {
namespace STATESCAN_ISA {
namespace {

template <class V, int... kLane>
STATESCAN_INLINE void unzip(V a, V b, V& even, V& odd, std::integer_sequence<int, kLane...>) {
  even = __builtin_shufflevector(a, b, (2 * kLane)...);
  odd = __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}

template <class V, int... kLane>
STATESCAN_INLINE void zip(V a, V b, V& low, V& high, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane);
  low = __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * n)...);
  high = __builtin_shufflevector(a, b, (n / 2 + kLane / 2 + kLane % 2 * n)...);
}

// Whether x is rows of four neighbouring elements, all of it one run of memory: what a state and a
// filter of width 4 usually are.
template <class R>
STATESCAN_INLINE bool packed_by_four(const Plane& x, int rows, int columns) {
  return columns == 4 && rows == kLanes<R> && x.row_stride == 4 && x.time_stride == 1;
}

// As load_tile with a vector of rows, but quick for a few columns.
template <class R>
STATESCAN_INLINE void load_columns(const Plane& x, int rows, int columns, R* tile) {
  constexpr int n = kLanes<R>;
  if (!packed_by_four<R>(x, rows, columns)) return load_tile(x, rows, columns, tile, n);
  const std::make_integer_sequence<int, n> lanes;
  with_type(x.dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(x.data);
    Vec<R> v[4], even[2], odd[2];
    for (int i = 0; i < 4; ++i) v[i] = load_convert<R>(from + i * n);
    unzip(v[0], v[1], even[0], odd[0], lanes);
    unzip(v[2], v[3], even[1], odd[1], lanes);
    unzip(even[0], even[1], v[0], v[2], lanes);
    unzip(odd[0], odd[1], v[1], v[3], lanes);
    for (int i = 0; i < 4; ++i) store(tile + i * n, v[i]);
  });
}

template <class R>
STATESCAN_INLINE void store_columns(const Plane& x, int rows, int columns, const R* tile) {
  constexpr int n = kLanes<R>;
  if (!packed_by_four<R>(x, rows, columns)) return store_tile(x, rows, columns, tile, n);
  const std::make_integer_sequence<int, n> lanes;
  with_type(x.dtype, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(x.data);
    Vec<R> v[4], even[2], odd[2];
    for (int i = 0; i < 4; ++i) v[i] = load(tile + i * n);
    zip(v[0], v[2], even[0], even[1], lanes);
    zip(v[1], v[3], odd[0], odd[1], lanes);
    zip(even[0], odd[0], v[0], v[1], lanes);
    zip(even[1], odd[1], v[2], v[3], lanes);
    for (int i = 0; i < 4; ++i) store_convert<R>(to + i * n, v[i]);
  });
}

template <class R>
class Update {
 public:
  Update(const UpdateParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    taps_ = scratch.take<R>((p.width + 1) * kLanes<R>);
    in_ = scratch.take<R>((std::max(p.state_len, p.width) + p.tokens) * kLanes<R>);
    y_ = scratch.take<R>(p.tokens * kLanes<R>);
  }

  void run(int64_t task) {
    const int64_t begin = task % p_.blocks() * p_.kChannels;
    const int64_t end = std::min(begin + p_.kChannels, p_.dim);
    const int64_t first = task / p_.blocks() * p_.kElements;
    const int64_t last = std::min(first + p_.kElements, p_.batch);
    for (int64_t channel = begin; channel < end; channel += kLanes<R>) {
      const int rows = int(std::min<int64_t>(kLanes<R>, end - channel));
      load_filter(channel, rows);
      for (int64_t b = first; b < last; ++b) {
        const int64_t slot = p_.slots == nullptr ? b : p_.slots[b];
        if (slot < 0) {
          clear(y_, p_.tokens * kLanes<R>);
        } else if (p_.positions == nullptr) {
          shift(b, slot, channel, rows);
        } else {
          turn(b, slot, channel, rows);
        }
        store_tile(plane(p_.y, b, channel, 0), rows, int(p_.tokens), y_, kLanes<R>);
      }
    }
  }

 private:
  void load_filter(int64_t channel, int rows) {
    const Plane weight{p_.weight.data, p_.weight.dtype, p_.weight.stride[0], p_.weight.stride[1]};
    load_columns(weight.at(channel, 0), rows, int(p_.width), taps_);
    R* bias = taps_ + p_.width * kLanes<R>;
    clear(bias, kLanes<R>);
    if (!p_.bias) return;
    load_tile(Plane{p_.bias.data, p_.bias.dtype, p_.bias.stride[0], 0}.at(channel, 0), rows, 1, bias,
              kLanes<R>);
  }

  // y of all tokens; in[0] is the first input that the first of them sees.
  void filter(const R* in) {
    const int64_t width = p_.width;
    for (int64_t j = 0; j < p_.tokens; ++j) {
      Vec<R> sum = load(taps_ + width * kLanes<R>);
      for (int64_t k = 0; k < width; ++k) {
        sum += load(taps_ + k * kLanes<R>) * load(in + (j + k) * kLanes<R>);
      }
      store(y_ + j * kLanes<R>, activate(sum, p_.silu));
    }
  }

  // The state holds the last state_len inputs in order.
  void shift(int64_t b, int64_t slot, int64_t channel, int rows) {
    const Plane state = plane(p_.state, slot, channel, 0);
    load_columns(state, rows, int(p_.state_len), in_);
    load_tile(plane(p_.x, b, channel, 0), rows, int(p_.tokens), in_ + p_.state_len * kLanes<R>,
              kLanes<R>);
    filter(in_ + (p_.state_len - (p_.width - 1)) * kLanes<R>);
    store_columns(state, rows, int(p_.state_len), in_ + p_.tokens * kLanes<R>);
  }

  // Input number t of the sequence is at t % state_len of the state.
  void turn(int64_t b, int64_t slot, int64_t channel, int rows) {
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
    filter(in_);
    for (int64_t j = std::max<int64_t>(0, p_.tokens - p_.state_len); j < p_.tokens; ++j) {
      store_tile(entry(position + j), rows, 1, x + j * kLanes<R>, kLanes<R>);
    }
  }

  const UpdateParams& p_;
  R *taps_, *in_, *y_;  // (tap or step, lane)
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
