// Forward of the selective scan on the CPU. See cpu_walk.h for who does what.
#include "selective_scan/cpu_rows.h"
#include "selective_scan/cpu_walk.h"

namespace statescan::selective_scan {
namespace STATESCAN_ISA {
namespace {

// The operands of one piece and one block of states, at the first step walked; `step` is +1 or -1.
template <class R>
struct Steps {
  int count, step;
  const R* delta;    // (step, lane)
  const R* delta_u;  // (step, lane)
  R* y;              // (step, lane), added to
  const R* A;        // (state, lane), times log2(e)
  const R* B;        // (step, B_pitch) or constant (state, lane)
  const R* C;
  int B_pitch, C_pitch;
  R* h;  // (state, lane)
};

// Walks kN states of one block of channels through a piece. `emit(i, h)` sees the states after step
// i (return_states); for nobody it costs nothing.
template <class R, int kN, bool kConstantB, bool kConstantC, class Emit>
STATESCAN_INLINE void walk(const Steps<R>& s, Emit&& emit) {
  Vec<R> h[kN];
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) h[n] = load(s.h + n * kLanes<R>);
  const R *delta_t = s.delta, *delta_u_t = s.delta_u, *B = s.B, *C = s.C;
  R* y_t = s.y;
  const int64_t lanes = int64_t(s.step) * kLanes<R>;
  for (int i = 0; i < s.count; ++i) {
    const Vec<R> delta = load(delta_t), delta_u = load(delta_u_t);
    Vec<R> y = load(y_t), y_odd{};
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const Vec<R> a = decay(delta, load(s.A + n * kLanes<R>));
      h[n] = next_state(a, h[n], delta_u, coefficient<R, kConstantB>(B, n));
      Vec<R>& sum = n % 2 ? y_odd : y;  // two sums halve the wait of an addition for the one before
      sum += coefficient<R, kConstantC>(C, n) * h[n];
    }
    store(y_t, y + y_odd);
    emit(i, h);
    delta_t += lanes, delta_u_t += lanes, y_t += lanes;
    B += s.B_pitch, C += s.C_pitch;
  }
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) store(s.h + n * kLanes<R>, h[n]);
}

template <class R>
class Forward {
 public:
  Forward(const FwdParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    const int64_t channels = p.task_channels() + kLanes<R>;
    pitch_ = tile_pitch<R>(int(p.state));
    B_ = scratch.take<R>(p.chunk * pitch_ + kLanes<R>);
    C_ = scratch.take<R>(p.chunk * pitch_ + kLanes<R>);
    u_ = scratch.take<R>(p.chunk * kLanes<R>);
    delta_ = scratch.take<R>(p.chunk * kLanes<R>);
    y_ = scratch.take<R>(p.chunk * kLanes<R>);
    z_ = scratch.take<R>(p.chunk * kLanes<R>);
    lanes_are_time_ = !p.states && lanes_can_be_time(p, {p.u, p.delta, p.z, p.y});
    h_ = scratch.take<R>(channels * p.state);
    A_ = scratch.take<R>(channels * p.state);
    D_ = scratch.take<R>(channels);
    bias_ = scratch.take<R>(channels);
    constant_B_ = scratch.take<R>(p.constant_B ? channels * p.state : 0);
    constant_C_ = scratch.take<R>(p.constant_C ? channels * p.state : 0);
  }

  void run(int64_t task) {
    c_ = task_channels(p_, task % p_.channel_tasks());
    const int64_t row = task / p_.channel_tasks();
    for_blocks([&](int64_t channel, int rows, int64_t offset) {
      const View<4> A{p_.A.data, p_.A.dtype, {0, p_.A.stride[0], p_.A.stride[1], 0}};
      load_table(A, channel, rows, p_.state, R(kLog2e), A_ + offset);
      store(D_ + channel - c_.begin, load_parameter<R>(p_.D, channel, rows, 0));
      store(bias_ + channel - c_.begin,
            load_parameter<R>(p_.delta_bias, channel, rows, 0, p_.delta_repeat));
      if (p_.constant_B) load_table(p_.B, channel, rows, p_.state, R(1), constant_B_ + offset);
      if (p_.constant_C) load_table(p_.C, channel, rows, p_.state, R(1), constant_C_ + offset);
    });
    for (int64_t s = p_.segments->row_offset[row]; s < p_.segments->row_offset[row + 1]; ++s) {
      run_segment(p_.segments->segments[s]);
    }
  }

 private:
  template <class F>
  STATESCAN_INLINE void for_blocks(F&& f) {
    for_channel_blocks<R>(p_, c_, f);
  }

  void run_segment(const Segment& segment) {
    for_blocks([&](int64_t channel, int rows, int64_t offset) {
      for (int64_t i = 0; i < p_.state * kLanes<R>; ++i) h_[offset + i] = 0;
      if (segment.initial_slot >= 0 && p_.initial_state) {
        load_tile(plane(p_.initial_state, segment.initial_slot, channel, 0), rows, int(p_.state),
                  h_ + offset, kLanes<R>);
      }
    });
    const int64_t pieces = piece_count(p_, segment);
    for (int64_t i = 0; i < pieces; ++i) run_piece(segment, piece_at(p_, segment, i));
    if (segment.last_slot < 0 || !p_.last_state) return;
    for_blocks([&](int64_t channel, int rows, int64_t offset) {
      store_tile(plane(p_.last_state, segment.last_slot, channel, 0), rows, int(p_.state),
                 h_ + offset, kLanes<R>);
    });
  }

  void run_piece(const Segment& segment, const Piece& piece) {
    const int steps = piece.steps();
    const int64_t b = segment.batch;
    if (!segment.padding) {
      if (!p_.constant_B) {
        load_tile(plane(p_.B, b, c_.group, piece.begin), int(p_.state), steps, B_, pitch_);
      }
      if (!p_.constant_C) {
        load_tile(plane(p_.C, b, c_.group, piece.begin), int(p_.state), steps, C_, pitch_);
      }
    }
    if (lanes_are_time_) {
      clear_behind(B_, steps);
      clear_behind(C_, steps);
    }
    for_blocks([&](int64_t channel, int rows, int64_t offset) {
      if (piece.entry && p_.chunk_states != nullptr) save(b, piece.chunk, channel, rows, offset);
      if (segment.padding) {
        for (int i = 0; i < steps * kLanes<R>; ++i) y_[i] = 0;
        if (p_.states) zero_states(b, piece, channel, rows);
      } else if (lanes_are_time_) {
        for (int r = 0; r < rows; ++r) scan_row(b, piece, channel + r);
        return;
      } else {
        prepare(b, piece, channel, rows);
        prefetch(b, piece, channel, kLanes<R>);
        scan(b, piece, channel, rows, offset);
        if (p_.z) gate(b, piece, channel, rows);
      }
      store_tile(plane(p_.y, b, channel, piece.begin), rows, steps, y_, kLanes<R>);
    });
  }

  void scan_row(int64_t b, const Piece& piece, int64_t channel) {
    const int steps = piece.steps();
    auto row = [&](const View<3>& x, int64_t channel) { return plane(x, b, channel, piece.begin); };
    const Plane u = row(p_.u, channel), delta = row(p_.delta, channel / p_.delta_repeat);
    const Plane z = p_.z ? row(p_.z, channel) : Plane{}, y = row(p_.y, channel);
    prefetch(b, piece, channel, 1);
    if (rows_in_place<R>(steps, {u, delta, z, y})) {
      with_type(u.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto numbers = [](const Plane& x) { return static_cast<T*>(x.data); };
        walk_along(channel, Row<R, T>{steps, numbers(u), numbers(delta), numbers(z)}, numbers(y));
      });
    } else {
      walk_along(channel,
                 Row<R, R>{steps, load_row(u, steps, u_), load_row(delta, steps, delta_),
                           load_row(z, steps, z_)},
                 y_);
      store_tile(y, 1, steps, y_, 1);
    }
  }

  // One state: lanes are time.
  template <class T>
  void walk_along(int64_t channel, Row<R, T> x, T* y) {
    const int64_t at = channel - c_.begin;
    x.B = B_, x.C = C_;
    x.A_log2e = A_[at], x.D = D_[at], x.bias = bias_[at];
    x.delta_softplus = p_.delta_softplus;
    h_[at] =
        p_.reverse ? walk_row<true>(x, h_[at], delta_, y) : walk_row<false>(x, h_[at], delta_, y);
  }

  // chunk_states[b, chunk, :, channel..] = h
  void save(int64_t b, int64_t chunk, int64_t channel, int rows, int64_t offset) {
    R* to = static_cast<R*>(p_.chunk_states) + (b * p_.chunks() + chunk) * p_.state * p_.dim;
    for (int64_t n = 0; n < p_.state; ++n) {
      store_first(to + n * p_.dim + channel, load(h_ + offset + n * kLanes<R>), rows);
    }
  }

  // Always inlined: g++ takes a function that only prefetches for one without effect and drops the call.
  STATESCAN_INLINE void prefetch(int64_t b, const Piece& piece, int64_t channel, int block) {
    for (const View<3>* x : {&p_.u, &p_.delta, &p_.z}) {
      if (*x && (x != &p_.delta || p_.delta_repeat == 1)) {
        prefetch_next(p_, *x, c_, b, piece, channel, block, p_.reverse ? -1 : 1);
      }
    }
    prefetch_next<true>(p_, p_.y, c_, b, piece, channel, block, p_.reverse ? -1 : 1);
  }

  // delta becomes the step size, u becomes delta u, y becomes D u.
  void prepare(int64_t b, const Piece& piece, int64_t channel, int rows) {
    const int steps = piece.steps();
    load_tile(plane(p_.u, b, channel, piece.begin), rows, steps, u_, kLanes<R>);
    load_tile(plane(p_.delta, b, 0, piece.begin), rows, steps, delta_, kLanes<R>, p_.delta_repeat,
              channel);
    const Vec<R> D = load(D_ + channel - c_.begin), bias = load(bias_ + channel - c_.begin);
    for (int i = 0; i < steps * kLanes<R>; i += kLanes<R>) {
      Vec<R> delta = load(delta_ + i) + bias;
      if (p_.delta_softplus) delta = softplus(delta);
      const Vec<R> u = load(u_ + i);
      store(delta_ + i, delta);
      store(u_ + i, delta * u);
      store(y_ + i, D * u);
    }
  }

  void scan(int64_t b, const Piece& piece, int64_t channel, int rows, int64_t offset) {
    const int steps = piece.steps();
    const int first = p_.reverse ? steps - 1 : 0, step = p_.reverse ? -1 : 1;
    auto walk_block = [&](auto size, int64_t n, auto B_is_constant, auto C_is_constant) {
      constexpr int kN = size();
      const Steps<R> s{
          steps,
          step,
          delta_ + first * kLanes<R>,
          u_ + first * kLanes<R>,
          y_ + first * kLanes<R>,
          A_ + offset + n * kLanes<R>,
          B_is_constant() ? constant_B_ + offset + n * kLanes<R> : B_ + first * pitch_ + n,
          C_is_constant() ? constant_C_ + offset + n * kLanes<R> : C_ + first * pitch_ + n,
          B_is_constant() ? 0 : step * pitch_,
          C_is_constant() ? 0 : step * pitch_,
          h_ + offset + n * kLanes<R>};
      if (!p_.states) {
        walk<R, kN, B_is_constant(), C_is_constant()>(s, [](int, const Vec<R>*) {});
        return;
      }
      walk<R, kN, B_is_constant(), C_is_constant()>(s, [&](int i, const Vec<R>* h) {
        emit_states(b, piece.begin + first + step * i, channel, rows, n, kN, h);
      });
    };
    const std::false_type varies;
    const std::true_type constant;
    if (!p_.constant_B && !p_.constant_C) {
      // double serves gradient checks: fewer block sizes keep it small
      for_state_blocks<std::is_same_v<R, float> ? 16 : 4>(
          0, p_.state, [&](auto size, int64_t n) { walk_block(size, n, varies, varies); });
      return;
    }
    for_state_blocks<4>(0, p_.state, [&](auto size, int64_t n) {
      if (!p_.constant_B) return walk_block(size, n, varies, constant);
      if (!p_.constant_C) return walk_block(size, n, constant, varies);
      walk_block(size, n, constant, constant);
    });
  }

  void emit_states(int64_t b, int64_t t, int64_t channel, int rows, int64_t n, int count,
                   const Vec<R>* h) {
    const View<4>& x = p_.states;
    for (int i = 0; i < count; ++i) {
      for (int r = 0; r < rows; ++r) {
        store_scalar<R>(
            x.dtype, x.data,
            b * x.stride[0] + t * x.stride[1] + (channel + r) * x.stride[2] + (n + i) * x.stride[3],
            h[i][r]);
      }
    }
  }

  void zero_states(int64_t b, const Piece& piece, int64_t channel, int rows) {
    const Vec<R> zero{};
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      for (int64_t n = 0; n < p_.state; ++n) emit_states(b, t, channel, rows, n, 1, &zero);
    }
  }

  void gate(int64_t b, const Piece& piece, int64_t channel, int rows) {
    load_tile(plane(p_.z, b, channel, piece.begin), rows, piece.steps(), z_, kLanes<R>);
    for (int i = 0; i < piece.steps() * kLanes<R>; i += kLanes<R>) {
      store(y_ + i, load(y_ + i) * silu(load(z_ + i)));
    }
  }

  const FwdParams& p_;
  Channels c_;
  int pitch_;
  bool lanes_are_time_;
  R *B_, *C_, *u_, *delta_, *z_, *y_, *h_, *A_, *D_, *bias_, *constant_B_, *constant_C_;
};

template <class R>
void run_tasks(const FwdParams& p, const Range& range) {
  Forward<R> forward(p, range.scratch);
  for (int64_t task = range.begin; task < range.end; ++task) forward.run(task);
}

}  // namespace

void fwd(const FwdParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return run_tasks<double>(p, range);
  run_tasks<float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::selective_scan
