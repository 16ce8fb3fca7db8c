// Backward of the short convolution on the CPU, in one pass over x and dy: each strip of positions
// p recomputes pre_p, takes its share of the sums over time, and gives dx_p from dpre_p and the
// width - 1 values of dpre before it, which are carried along. See cpu_walk.h for who does what.
#include "causal_conv1d/cpu_walk.h"

namespace statescan::causal_conv1d {
namespace STATESCAN_ISA {
namespace {

// What a walk along a sequence carries and adds up, for some channels. Lane c of row i is at
// [i * pitch + c].
template <class R>
struct Walk {
  R* carry;  // (width - 1, channel): dpre_{p - (width - 1)} .. dpre_{p - 1}
  R* sums;   // (width + 1, channel): dw, then dbias
  int pitch;
};

// kSteps positions of `channels` channels, whole vectors.
template <class R, int kWidth, int kSteps, class T>
STATESCAN_INLINE void strip(const T* x, int64_t x_step, const T* dy, int64_t dy_step, T* dx,
                            int64_t dx_step, const Filter<R>& f, const Walk<R>& walk,
                            int channels) {
  for (int c = 0; c < channels; c += kLanes<R>) {
    Vec<R> in[kSteps + kWidth - 1], dpre[kSteps + kWidth - 1];
#pragma GCC unroll 16
    for (int i = 0; i < kSteps + kWidth - 1; ++i) in[i] = load_convert<R>(x + i * x_step + c);
#pragma GCC unroll 8
    for (int i = 0; i < kWidth - 1; ++i) dpre[i] = load(walk.carry + i * walk.pitch + c);
    const Vec<R> bias = load(f.tap(kWidth) + c);
    Vec<R> dbias = load(walk.sums + kWidth * walk.pitch + c);
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) {
      Vec<R> pre = bias;
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) pre += load(f.tap(k) + c) * in[i + k];
      const Vec<R> d = activate_vjp(pre, load_convert<R>(dy + i * dy_step + c), f.silu);
      dpre[kWidth - 1 + i] = d;
      dbias += d;
    }
    store(walk.sums + kWidth * walk.pitch + c, dbias);
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k) {
      Vec<R> dw = load(walk.sums + k * walk.pitch + c);
#pragma GCC unroll 8
      for (int i = 0; i < kSteps; ++i) dw += dpre[kWidth - 1 + i] * in[i + k];
      store(walk.sums + k * walk.pitch + c, dw);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) {
      Vec<R> d = load(f.tap(0) + c) * dpre[kWidth - 1 + i];
#pragma GCC unroll 8
      for (int k = 1; k < kWidth; ++k) d += load(f.tap(k) + c) * dpre[kWidth - 1 + i - k];
      store_convert<R>(dx + i * dx_step + c, d);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kWidth - 1; ++i) store(walk.carry + i * walk.pitch + c, dpre[kSteps + i]);
  }
}

// One position, any width.
template <class R, class T>
void strip_any_width(const T* x, int64_t x_step, const T* dy, T* dx, const Filter<R>& f,
                     const Walk<R>& walk, int channels) {
  for (int c = 0; c < channels; c += kLanes<R>) {
    Vec<R> pre = load(f.tap(f.width) + c);
    for (int k = 0; k < f.width; ++k) {
      pre += load(f.tap(k) + c) * load_convert<R>(x + k * x_step + c);
    }
    const Vec<R> dpre = activate_vjp(pre, load_convert<R>(dy + c), f.silu);
    R* sums = walk.sums + c;
    for (int k = 0; k < f.width; ++k, sums += walk.pitch) {
      store(sums, load(sums) + dpre * load_convert<R>(x + k * x_step + c));
    }
    store(sums, load(sums) + dpre);
    Vec<R> d = load(f.tap(0) + c) * dpre;
    R* carry = walk.carry + c;
    for (int k = f.width - 1; k > 0; --k, carry += walk.pitch) {
      d += load(f.tap(k) + c) * load(carry);
      store(carry, k > 1 ? load(carry + walk.pitch) : dpre);
    }
    store_convert<R>(dx + c, d);
  }
}

template <class R, int kWidth, class T>
void strips(const T* x, int64_t x_step, const T* dy, int64_t dy_step, T* dx, int64_t dx_step,
            int64_t steps, const Filter<R>& f, const Walk<R>& walk, int channels) {
  if constexpr (kWidth == 0) {
    for (int64_t p = 0; p < steps; ++p) {
      strip_any_width(x + p * x_step, x_step, dy + p * dy_step, dx + p * dx_step, f, walk,
                      channels);
    }
  } else {
    constexpr int kSteps = 8;
    int64_t p = 0;
    for (; p + kSteps <= steps; p += kSteps) {
      strip<R, kWidth, kSteps>(x + p * x_step, x_step, dy + p * dy_step, dy_step, dx + p * dx_step,
                               dx_step, f, walk, channels);
    }
    for (; p < steps; ++p) {
      strip<R, kWidth, 1>(x + p * x_step, x_step, dy + p * dy_step, dy_step, dx + p * dx_step,
                          dx_step, f, walk, channels);
    }
  }
}

inline constexpr int kRow = 4 * kTile;  // time steps between the two halves of `row`

// `count` positions of one channel. Whole vectors of time steps are read and written; beyond
// `count` dy must be zero. `dpre` has room for (width - 1) + kRow + lanes, and carries its first
// width - 1 from call to call; sums[k] is dw_k, then dbias, still spread over the lanes.
template <class R, int kWidth, class T>
void row(const T* x, const T* dy, T* dx, int64_t count, const Filter<R>& f, R* dpre, R* sums) {
  Vec<R> w[kWidth + 1], sum[kWidth + 1];
#pragma GCC unroll 9
  for (int k = 0; k <= kWidth; ++k) {
    w[k] = splat(*f.tap(k));
    sum[k] = load(sums + k * kLanes<R>);
  }
  for (int64_t begin = 0; begin < count; begin += kRow) {
    const int64_t steps = std::min<int64_t>(kRow, count - begin);
    R* d = dpre + kWidth - 1;
    for (int64_t p = 0; p < steps; p += kLanes<R>) {
      Vec<R> in[kWidth], pre = w[kWidth];
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) {
        in[k] = load_convert<R>(x + begin + p + k);
        pre += w[k] * in[k];
      }
      const Vec<R> v = activate_vjp(pre, load_convert<R>(dy + begin + p), f.silu);
      store(d + p, v);
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) sum[k] += v * in[k];
      sum[kWidth] += v;
    }
    for (int64_t p = 0; p < steps; p += kLanes<R>) {
      Vec<R> v = w[0] * load(d + p);
#pragma GCC unroll 8
      for (int k = 1; k < kWidth; ++k) v += w[k] * load(d + p - k);
      store_convert<R>(dx + begin + p, v);
    }
    for (int i = 0; i < kWidth - 1; ++i) dpre[i] = dpre[steps + i];
  }
#pragma GCC unroll 9
  for (int k = 0; k <= kWidth; ++k) store(sums + k * kLanes<R>, sum[k]);
}

template <class R>
class Backward {
 public:
  Backward(const BwdParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    for (R** tile : {&x_, &dy_, &dx_}) *tile = scratch.take<R>(kTile * (kTile + p.width - 1));
    span_pitch_ = int(std::min(p.dim, p.block_units * kUnit) + 2 * kUnit) / int(kUnit) * int(kUnit);
    carry_ = scratch.take<R>((p.width - 1) * span_pitch_);
    sums_ = scratch.take<R>((p.width + 1) * span_pitch_);
    unused_sums_ = scratch.take<R>((p.width + 1) * span_pitch_);
    dpre_ = scratch.take<R>(p.width - 1 + kRow + kLanes<R>);
  }

  void run(int64_t task) {
    group_ = task / p_.blocks();
    const int64_t count = int64_t(p_.pieces->size()), block = task % p_.blocks();
    first_ = count * group_ / p_.groups();
    end_ = count * (group_ + 1) / p_.groups();
    const int64_t begin = p_.block_begin(block), end = p_.block_begin(block + 1);
    if (p_.layout == Layout::kChannelFirst) {
      return with_storage_and_width(p_.x.dtype, p_.width, [&](auto* type, auto width) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int64_t c = begin; c < end; ++c) run_row<T, width()>(c);
      });
    }
    if (p_.layout == Layout::kChannelLast) {
      return with_storage_and_width(p_.x.dtype, p_.width, [&](auto* type, auto width) {
        using T = std::remove_pointer_t<decltype(type)>;
        for_spans<R>(begin, end, [&](int64_t channel, int channels) {
          run_span(channel, channels, [&](const Sequence& s, const Piece& piece) {
            walk_in_place<T, width()>(s, piece, channel, channels);
          });
        });
      });
    }
    for_spans<R>(begin, end, [&](int64_t channel, int channels) {
      run_span(channel, channels, [&](const Sequence& s, const Piece& piece) {
        walk_tiles(s, piece.begin, piece.end, channel, channels, sums_, true);
      });
    });
  }

 private:
  // f(sequence, piece) for every piece of the task; padding gets its zeros.
  template <class F>
  void for_pieces(int64_t channel, int channels, F&& f) {
    for (int64_t i = first_; i < end_; ++i) {
      const Piece& piece = (*p_.pieces)[i];
      const Segment& segment = p_.segments->segments[piece.segment];
      if (segment.padding) {
        store_zeros(p_.dx, segment.batch, channel, channel + channels, segment.begin + piece.begin,
                    segment.begin + piece.end, x_);
      } else {
        f(Sequence{p_, segment, p_.x, p_.initial_state}, piece);
      }
    }
  }

  template <class F>
  void run_span(int64_t channel, int channels, F&& walk) {
    clear(sums_, (p_.width + 1) * span_pitch_);
    for_pieces(channel, channels, [&](const Sequence& s, const Piece& piece) {
      clear(carry_, (p_.width - 1) * span_pitch_);
      if (piece.begin > 0) {  // dpre before the piece; its sums belong to the piece before
        walk_tiles(s, std::max<int64_t>(0, piece.begin - (p_.width - 1)), piece.begin, channel,
                   channels, unused_sums_, false);
      }
      walk(s, piece);
    });
    R* to = static_cast<R*>(p_.dfilter) + group_ * (p_.width + 1) * p_.dim + channel;
    for (int64_t k = 0; k <= p_.width; ++k) {
      for (int c = 0; c < channels; ++c) to[k * p_.dim + c] = sums_[k * span_pitch_ + c];
    }
  }

  // The positions of a piece that neither see padding nor get the gradient of a final state.
  Piece inside(const Sequence& s, const Piece& piece) const {
    return {piece.segment, std::max(piece.begin, p_.width - 1),
            std::min(piece.end, s.length() - p_.right())};
  }

  template <class T, int kWidth>
  void walk_in_place(const Sequence& s, const Piece& piece, int64_t channel, int channels) {
    if constexpr (std::is_same_v<R, float>) {
      const Piece in = inside(s, piece);
      if (in.end <= in.begin) {
        return walk_tiles(s, piece.begin, piece.end, channel, channels, sums_, true);
      }
      const int64_t b = s.segment.batch;
      walk_tiles(s, piece.begin, in.begin, channel, channels, sums_, true);
      strips<R, kWidth>(element<const T>(p_.x, b, channel, s.time(in.begin)), p_.x.stride[2],
                        element<const T>(p_.dy, b, channel, s.segment.begin + in.begin),
                        p_.dy.stride[2], element<T>(p_.dx, b, channel, s.time(in.begin)),
                        p_.dx.stride[2], in.end - in.begin, filter_at<R>(p_, channel),
                        Walk<R>{carry_, sums_, span_pitch_}, channels);
      walk_tiles(s, in.end, piece.end, channel, channels, sums_, true);
    }
  }

  // Positions [begin, end) by way of tiles. `keep`: store dx.
  void walk_tiles(const Sequence& s, int64_t begin, int64_t end, int64_t first, int channels,
                  R* sums, bool keep) {
    for (int64_t at = begin; at < end; at += kTile) {
      const int steps = int(std::min<int64_t>(kTile, end - at));
      for (int c = 0; c < channels; c += kTile) {
        const int rows = std::min(kTile, channels - c), pitch = round_to_lanes<R>(rows);
        s.load(first + c, rows, at, int(steps + p_.width - 1), x_, pitch);
        load_dy(s, first + c, rows, at, steps, pitch);
        with_width<R>(p_.width, [&](auto width) {
          strips<R, width()>(const_cast<const R*>(x_), pitch, const_cast<const R*>(dy_), pitch, dx_,
                             pitch, steps, filter_at<R>(p_, first + c),
                             Walk<R>{carry_ + c, sums + c, span_pitch_}, pitch);
        });
        if (keep) store_dx(s, first + c, rows, at, steps, pitch);
      }
    }
  }

  template <class T, int kWidth>
  void run_row(int64_t channel) {
    if constexpr (std::is_same_v<R, float>) {
      clear(sums_, (kWidth + 1) * kLanes<R>);
      for_pieces(channel, 1, [&](const Sequence& s, const Piece& piece) {
        clear(dpre_, kWidth - 1);
        if (piece.begin > 0) {
          clear(unused_sums_, (kWidth + 1) * kLanes<R>);
          row_edge<kWidth>(s, std::max<int64_t>(0, piece.begin - (kWidth - 1)), piece.begin,
                           channel, unused_sums_, false);
        }
        const Piece in = inside(s, piece);
        const int64_t whole = (in.end - in.begin) / kLanes<R> * kLanes<R>;
        if (whole <= 0) {
          return row_edge<kWidth>(s, piece.begin, piece.end, channel, sums_, true);
        }
        row_edge<kWidth>(s, piece.begin, in.begin, channel, sums_, true);
        const int64_t b = s.segment.batch, t = s.segment.begin + in.begin;
        row<R, kWidth>(element<const T>(p_.x, b, channel, t - p_.left()),
                       element<const T>(p_.dy, b, channel, t),
                       element<T>(p_.dx, b, channel, t - p_.left()), whole,
                       filter_at<R>(p_, channel), dpre_, sums_);
        row_edge<kWidth>(s, in.begin + whole, piece.end, channel, sums_, true);
      });
      R* to = static_cast<R*>(p_.dfilter) + group_ * (kWidth + 1) * p_.dim + channel;
      for (int k = 0; k <= kWidth; ++k) {
        to[k * p_.dim] = sum_lanes_of<R>(load(sums_ + k * kLanes<R>));
      }
    }
  }

  template <int kWidth>
  void row_edge(const Sequence& s, int64_t begin, int64_t end, int64_t channel, R* sums,
                bool keep) {
    for (int64_t at = begin; at < end; at += kTile) {
      const int steps = int(std::min<int64_t>(kTile, end - at)), vectors = round_to_lanes<R>(steps);
      s.load(channel, 1, at, vectors + kWidth - 1, x_, 1);
      clear(dy_ + steps, vectors - steps);
      load_dy(s, channel, 1, at, steps, 1);
      row<R, kWidth>(const_cast<const R*>(x_), const_cast<const R*>(dy_), dx_, steps,
                     filter_at<R>(p_, channel), dpre_, sums);
      if (keep) store_dx(s, channel, 1, at, steps, 1);
    }
  }

  // dy of positions [begin, begin + count), 0 past the last output.
  void load_dy(const Sequence& s, int64_t channel, int rows, int64_t begin, int count, int pitch) {
    const int64_t there = std::clamp<int64_t>(s.length() - begin, 0, p_.dy ? count : 0);
    if (there > 0) {
      load_tile(plane(p_.dy, s.segment.batch, channel, s.segment.begin + begin), rows, int(there),
                dy_, pitch);
    }
    clear(dy_ + there * pitch, (count - there) * pitch);
  }

  // The tile dx of positions [begin, begin + count), with the final state's gradient, to where its
  // parts belong: the initial state and x.
  void store_dx(const Sequence& s, int64_t channel, int rows, int64_t begin, int count, int pitch) {
    const int64_t end = begin + count, left = p_.left(), inputs_end = left + s.length();
    add_final_state(s, channel, rows, begin, count, pitch);
    auto part = [&](int64_t from, int64_t to, auto&& target) {
      from = std::max(from, begin), to = std::min(to, end);
      if (from >= to) return;
      store_tile(target(from), rows, int(to - from), dx_ + (from - begin) * pitch, pitch);
    };
    part(left, inputs_end,
         [&](int64_t p) { return plane(p_.dx, s.segment.batch, channel, s.time(p)); });
    if (!p_.dinitial_state || s.segment.initial_slot < 0) return;
    const int64_t slot = s.segment.initial_slot;
    part(0, left, [&](int64_t p) { return plane(p_.dinitial_state, slot, channel, p); });
    part(inputs_end, s.length() + p_.width - 1,
         [&](int64_t p) { return plane(p_.dinitial_state, slot, channel, p - inputs_end); });
  }

  void add_final_state(const Sequence& s, int64_t channel, int rows, int64_t begin, int count,
                       int pitch) {
    if (!p_.dfinal_state || s.segment.last_slot < 0) return;
    const int64_t first = p_.mode == Mode::kAnticausal ? 0 : s.length();
    const int64_t from = std::max(begin, first);
    const int64_t to = std::min(begin + count, first + p_.width - 1);
    if (from >= to) return;
    R* state = x_;  // the inputs have served
    load_tile(plane(p_.dfinal_state, s.segment.last_slot, channel, from - first), rows,
              int(to - from), state, pitch);
    R* dx = dx_ + (from - begin) * pitch;
    for (int64_t i = 0; i < (to - from) * pitch; ++i) dx[i] += state[i];
  }

  const BwdParams& p_;
  int64_t group_, first_, end_;  // the pieces of the task
  int span_pitch_;
  R *x_, *dy_, *dx_;                 // (position, channel)
  R *carry_, *sums_, *unused_sums_;  // see Walk
  R* dpre_;                          // see row
};

template <class R>
void run_tasks(const BwdParams& p, const Range& range) {
  Backward<R> backward(p, range.scratch);
  for (int64_t task = range.begin; task < range.end; ++task) backward.run(task);
}

}  // namespace

void bwd(const BwdParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return run_tasks<double>(p, range);
  run_tasks<float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::causal_conv1d
