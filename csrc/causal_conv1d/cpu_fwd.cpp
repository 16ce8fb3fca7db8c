// Forward of the short convolution on the CPU. See cpu_walk.h for who does what.
#include "causal_conv1d/cpu_walk.h"

namespace statescan::causal_conv1d {
namespace STATESCAN_ISA {
namespace {

// kSteps outputs of `channels` channels, whole vectors: y[i, c] from x[i + k, c], k < width. A few
// steps at once share the loads of their inputs; rows are walked along the channels, so memory is
// read in order.
template <class R, int kWidth, int kSteps, class T>
STATESCAN_INLINE void filter_strip(const T* x, int64_t x_step, T* y, int64_t y_step,
                                   const Filter<R>& f, int channels) {
  for (int c = 0; c < channels; c += kLanes<R>) {
    const Vec<R> bias = load(f.tap(f.width) + c);
    Vec<R> sum[kSteps];
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) sum[i] = bias;
    if constexpr (kWidth > 0) {
      Vec<R> in[kSteps + kWidth - 1];
#pragma GCC unroll 16
      for (int i = 0; i < kSteps + kWidth - 1; ++i) in[i] = load_convert<R>(x + i * x_step + c);
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) {
        const Vec<R> w = load(f.tap(k) + c);
#pragma GCC unroll 8
        for (int i = 0; i < kSteps; ++i) sum[i] += w * in[i + k];
      }
    } else {
      for (int k = 0; k < f.width; ++k) {
        const Vec<R> w = load(f.tap(k) + c);
#pragma GCC unroll 8
        for (int i = 0; i < kSteps; ++i) sum[i] += w * load_convert<R>(x + (i + k) * x_step + c);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) {
      store_convert<R>(y + i * y_step + c, activate(sum[i], f.silu));
    }
  }
}

template <class R, int kWidth, class T>
void filter_strips(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t steps,
                   const Filter<R>& f, int channels) {
  constexpr int kSteps = 8;  // 11 inputs and 8 sums of width 4 fit the 32 registers of AVX-512
  int64_t t = 0;
  for (; t + kSteps <= steps; t += kSteps) {
    filter_strip<R, kWidth, kSteps>(x + t * x_step, x_step, y + t * y_step, y_step, f, channels);
  }
  for (; t < steps; ++t) {
    filter_strip<R, kWidth, 1>(x + t * x_step, x_step, y + t * y_step, y_step, f, channels);
  }
}

// `count` outputs of one channel, whole vectors of time steps: y[t] from x[t + k], k < kWidth.
template <class R, int kWidth, class T>
void filter_row(const T* x, T* y, int64_t count, const Filter<R>& f) {
  Vec<R> w[kWidth + 1];
#pragma GCC unroll 9
  for (int k = 0; k <= kWidth; ++k) w[k] = splat(*f.tap(k));
  for (int64_t t = 0; t < count; t += kLanes<R>) {
    Vec<R> sum = w[kWidth];
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k) sum += w[k] * load_convert<R>(x + t + k);
    store_convert<R>(y + t, activate(sum, f.silu));
  }
}

template <class R>
class Forward {
 public:
  Forward(const FwdParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    x_ = scratch.take<R>(kTile * (kTile + p.width - 1));
    y_ = scratch.take<R>(kTile * kTile);
  }

  void run(int64_t task) {
    const Piece& piece = (*p_.pieces)[task / p_.blocks()];
    const int64_t block = task % p_.blocks();
    const int64_t begin = p_.block_begin(block), end = p_.block_begin(block + 1);
    const Segment& segment = p_.segments->segments[piece.segment];
    if (segment.padding) {
      store_zeros(p_.y, segment.batch, begin, end, segment.begin + piece.begin,
                  segment.begin + piece.end, x_);
      return;
    }
    const Sequence sequence{p_, segment, p_.x, p_.initial_state};
    filter(sequence, piece, begin, end);
    if (piece.end == sequence.length() && p_.final_state && segment.last_slot >= 0) {
      store_final_state(sequence, begin, end);
    }
  }

 private:
  void filter(const Sequence& s, const Piece& piece, int64_t begin, int64_t end) {
    if (p_.layout == Layout::kChannelLast) {
      return with_storage_and_width(p_.x.dtype, p_.width, [&](auto* type, auto width) {
        using T = std::remove_pointer_t<decltype(type)>;
        for_spans<R>(begin, end, [&](int64_t channel, int channels) {
          strips<T, width()>(s, piece, channel, channels);
        });
      });
    }
    if (p_.layout == Layout::kChannelFirst) {
      return with_storage_and_width(p_.x.dtype, p_.width, [&](auto* type, auto width) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int64_t c = begin; c < end; ++c) row<T, width()>(s, piece, c);
      });
    }
    for_spans<R>(begin, end, [&](int64_t channel, int channels) {
      tiles(s, piece.begin, piece.end, channel, channels);
    });
  }

  // The outputs of a piece that see no padding.
  Piece inside(const Sequence& s, const Piece& piece) const {
    return {piece.segment, std::max(piece.begin, p_.left()),
            std::min(piece.end, s.length() - p_.right())};
  }

  template <class T, int kWidth>
  void strips(const Sequence& s, const Piece& piece, int64_t channel, int channels) {
    if constexpr (std::is_same_v<R, float>) {
      const Piece in = inside(s, piece);
      if (in.end <= in.begin) return tiles(s, piece.begin, piece.end, channel, channels);
      const int64_t b = s.segment.batch;
      tiles(s, piece.begin, in.begin, channel, channels);
      filter_strips<R, kWidth>(element<const T>(p_.x, b, channel, s.time(in.begin)), p_.x.stride[2],
                               element<T>(p_.y, b, channel, s.segment.begin + in.begin),
                               p_.y.stride[2], in.end - in.begin, filter_at<R>(p_, channel),
                               channels);
      tiles(s, in.end, piece.end, channel, channels);
    }
  }

  template <class T, int kWidth>
  void row(const Sequence& s, const Piece& piece, int64_t channel) {
    if constexpr (std::is_same_v<R, float>) {
      Piece in = inside(s, piece);
      const int64_t count = in.end - in.begin, whole = count / kLanes<R> * kLanes<R>;
      if (whole <= 0) return row_edge<kWidth>(s, piece.begin, piece.end, channel);
      row_edge<kWidth>(s, piece.begin, in.begin, channel);
      auto direct = [&](int64_t t, int64_t steps) {
        filter_row<R, kWidth>(element<const T>(p_.x, s.segment.batch, channel, s.time(t)),
                              element<T>(p_.y, s.segment.batch, channel, s.segment.begin + t),
                              steps, filter_at<R>(p_, channel));
      };
      direct(in.begin, whole);
      if (whole < count) direct(in.end - kLanes<R>, kLanes<R>);  // some of them once more
      row_edge<kWidth>(s, in.end, piece.end, channel);
    }
  }

  // Outputs [begin, end) of one channel, by way of a tile of that one row.
  template <int kWidth>
  void row_edge(const Sequence& s, int64_t begin, int64_t end, int64_t channel) {
    for (int64_t t = begin; t < end; t += kTile) {
      const int count = int(std::min<int64_t>(kTile, end - t)), vectors = round_to_lanes<R>(count);
      s.load(channel, 1, t, vectors + kWidth - 1, x_, 1);
      filter_row<R, kWidth>(x_, y_, vectors, filter_at<R>(p_, channel));
      store_tile(plane(p_.y, s.segment.batch, channel, s.segment.begin + t), 1, count, y_, 1);
    }
  }

  // Outputs [begin, end) of whole vectors of channels, or of fewer, by way of tiles.
  void tiles(const Sequence& s, int64_t begin, int64_t end, int64_t first, int channels) {
    for (int64_t t = begin; t < end; t += kTile) {
      const int steps = int(std::min<int64_t>(kTile, end - t));
      for (int c = 0; c < channels; c += kTile) {
        tile(s, t, steps, first + c, std::min(kTile, channels - c));
      }
    }
  }

  void tile(const Sequence& s, int64_t t, int steps, int64_t channel, int rows) {
    const int pitch = round_to_lanes<R>(rows);
    s.load(channel, rows, t, int(steps + p_.width - 1), x_, pitch);
    with_width<R>(p_.width, [&](auto width) {
      filter_strips<R, width()>(const_cast<const R*>(x_), pitch, y_, pitch, steps,
                                filter_at<R>(p_, channel), pitch);
    });
    store_tile(plane(p_.y, s.segment.batch, channel, s.segment.begin + t), rows, steps, y_, pitch);
  }

  // The last width - 1 inputs of the padded sequence; of an anticausal one the first.
  void store_final_state(const Sequence& s, int64_t begin, int64_t end) {
    const int64_t from = p_.mode == Mode::kAnticausal ? 0 : s.length();
    for (int64_t i = 0; i < p_.width - 1; i += kTile) {
      const int steps = int(std::min<int64_t>(kTile, p_.width - 1 - i));
      for (int64_t c = begin; c < end; c += kTile) {
        const int rows = int(std::min<int64_t>(kTile, end - c)), pitch = round_to_lanes<R>(rows);
        s.load(c, rows, from + i, steps, x_, pitch);
        store_tile(plane(p_.final_state, s.segment.last_slot, c, i), rows, steps, x_, pitch);
      }
    }
  }

  const FwdParams& p_;
  R *x_, *y_;  // (step, channel)
};

template <class R>
void run_tasks(const FwdParams& p, const Range& range) {
  Forward<R> forward(p, range.scratch);
  for (int64_t task = range.begin; task < range.end; ++task) forward.run(task);
}

// The taps of all channels, one channel in each lane, tap by tap.
template <class R>
void fill_filter(const FilterParams& p, R* filter) {
  clear(filter, (p.width + 1) * p.pitch);
  const int step = p.mirror ? -1 : 1;
  for (int64_t d = 0; d < p.dim; d += kLanes<R>) {
    const int rows = int(std::min<int64_t>(kLanes<R>, p.dim - d));
    for (int64_t k = 0; k < p.width; ++k) {
      const int64_t at = step > 0 ? k : p.width - 1 - k;
      load_tile(Plane{p.weight.data, p.weight.dtype, p.weight.stride[0], 1}.shifted(
                    d * p.weight.stride[0] + at * p.weight.stride[1]),
                rows, 1, filter + k * p.pitch + d, kLanes<R>);
    }
    if (!p.bias) continue;
    load_tile(Plane{p.bias.data, p.bias.dtype, p.bias.stride[0], 0}.at(d, 0), rows, 1,
              filter + p.width * p.pitch + d, kLanes<R>);
  }
}

}  // namespace

void prepare_filter(const FilterParams& p, const Range&) {
  if (p.compute == DType::kFloat64) return fill_filter(p, static_cast<double*>(p.filter));
  fill_filter(p, static_cast<float*>(p.filter));
}

void fwd(const FwdParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return run_tasks<double>(p, range);
  run_tasks<float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::causal_conv1d
