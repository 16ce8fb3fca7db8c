// Backward of the selective scan on the CPU. See cpu_walk.h for who does what.
#include "selective_scan/cpu_rows.h"
#include "selective_scan/cpu_walk_back.h"

namespace statescan::selective_scan {
namespace STATESCAN_ISA {
namespace {

template <class R>
class Backward {
 public:
  Backward(const BwdParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    const int64_t lanes = p.chunk * kLanes<R>;
    const int64_t table = (p.task_channels() + kLanes<R>)*p.state;
    pitch_ = tile_pitch<R>(int(p.state));
    for (R** tile : {&B_, &C_, &dB_, &dC_}) {
      *tile = scratch.take<R>(p.chunk * pitch_ + kLanes<R>);
    }
    for (R** tile : {&u_, &delta_, &delta_u_, &slope_, &dy_, &z_, &y_, &d_delta_, &d_delta_u_}) {
      *tile = scratch.take<R>(lanes);
    }
    for (R** t : {&A_, &A_log2e_, &dA_, &dh_}) *t = scratch.take<R>(table);
    for (R** t : {&B_table_, &dB_table_}) *t = scratch.take<R>(p.constant_B ? table : 0);
    for (R** t : {&C_table_, &dC_table_}) *t = scratch.take<R>(p.constant_C ? table : 0);
    h0_ = scratch.take<R>(p.state * kLanes<R>);
    for (R** x : {&D_, &bias_, &dD_, &dbias_}) {
      *x = scratch.take<R>(p.task_channels() + kLanes<R>);
    }
    const int64_t held = (p.state < 16 ? p.state : 16) * kLanes<R>;
    h_ = scratch.take<R>((p.chunk + 1) * held);
    a_ = scratch.take<R>(p.chunk * held);
    lanes_are_time_ =
        !p.dstates && lanes_can_be_time(p, {p.u, p.delta, p.z, p.dy, p.du, p.ddelta, p.dz});
  }

  void run(int64_t task) {
    c_ = task_channels(p_, task % p_.channel_tasks());
    const int64_t rows = p_.segments->rows(), groups = p_.row_groups();
    row_group_ = task / p_.channel_tasks();
    begin();
    for (int64_t row = rows * row_group_ / groups; row < rows * (row_group_ + 1) / groups; ++row) {
      for (int64_t s = p_.segments->row_offset[row + 1]; s-- > p_.segments->row_offset[row];) {
        run_segment(p_.segments->segments[s]);
      }
    }
    finish();
  }

 private:
  template <class F>
  STATESCAN_INLINE void for_blocks(F&& f) {
    for_channel_blocks<R>(p_, c_, f);
  }

  STATESCAN_INLINE void clear(R* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = 0;
  }

  void begin() {
    for_blocks([&](int64_t channel, int rows, int64_t offset) {
      const int64_t count = p_.state * kLanes<R>;
      const View<4> A{p_.A.data, p_.A.dtype, {0, p_.A.stride[0], p_.A.stride[1], 0}};
      load_table(A, channel, rows, p_.state, R(1), A_ + offset);
      load_table(A, channel, rows, p_.state, R(kLog2e), A_log2e_ + offset);
      clear(dA_ + offset, count);
      store(D_ + channel - c_.begin, load_parameter<R>(p_.D, channel, rows, 0));
      store(bias_ + channel - c_.begin,
            load_parameter<R>(p_.delta_bias, channel, rows, 0, p_.delta_repeat));
      if (p_.constant_B) {
        load_table(p_.B, channel, rows, p_.state, R(1), B_table_ + offset);
        clear(dB_table_ + offset, count);
      }
      if (p_.constant_C) {
        load_table(p_.C, channel, rows, p_.state, R(1), C_table_ + offset);
        clear(dC_table_ + offset, count);
      }
      clear(dD_ + (channel - c_.begin), kLanes<R>);
      clear(dbias_ + (channel - c_.begin), kLanes<R>);
    });
  }

  // Hands over what was summed over the rows of this task.
  void finish() {
    for_blocks([&](int64_t channel, int rows, int64_t offset) {
      const int64_t at = row_group_ * p_.dim + channel;
      auto table = [&](void* to, const R* from) {
        store_tile(Plane{static_cast<R*>(to) + at * p_.state, p_.compute, p_.state, 1}, rows,
                   int(p_.state), from + offset, kLanes<R>);
      };
      table(p_.dA, dA_);
      if (p_.constant_B) table(p_.dB, dB_table_);
      if (p_.constant_C) table(p_.dC, dC_table_);
      store_first(static_cast<R*>(p_.dD) + at, load(dD_ + (channel - c_.begin)), rows);
      store_first(static_cast<R*>(p_.ddelta_bias) + at, load(dbias_ + (channel - c_.begin)), rows);
    });
  }

  void run_segment(const Segment& segment) {
    for_blocks([&](int64_t channel, int rows, int64_t offset) {
      clear(dh_ + offset, p_.state * kLanes<R>);
      if (segment.last_slot >= 0 && p_.dlast_state) {
        load_tile(plane(p_.dlast_state, segment.last_slot, channel, 0), rows, int(p_.state),
                  dh_ + offset, kLanes<R>);
      }
    });
    for (int64_t i = piece_count(p_, segment); i-- > 0;) {
      run_piece(segment, piece_at(p_, segment, i));
    }
    if (segment.initial_slot < 0 || !p_.dinitial_state) return;
    for_blocks([&](int64_t channel, int rows, int64_t offset) {
      store_tile(plane(p_.dinitial_state, segment.initial_slot, channel, 0), rows, int(p_.state),
                 dh_ + offset, kLanes<R>);
    });
  }

  void run_piece(const Segment& segment, const Piece& piece) {
    const int steps = piece.steps();
    const int64_t b = segment.batch;
    clear(dB_, steps * pitch_);
    clear(dC_, steps * pitch_);
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
      if (lanes_are_time_ && !segment.padding) {
        load_h0(segment, piece, channel, rows);
        for (int r = 0; r < rows; ++r) scan_row(b, piece, channel + r, h0_[r]);
        return;
      }
      if (segment.padding) {
        for (R* tile : {u_, delta_, z_}) clear(tile, steps * kLanes<R>);
      } else {
        prepare(b, piece, channel, rows);
        prefetch(b, piece, channel, kLanes<R>);
        load_h0(segment, piece, channel, rows);
        scan(b, piece, channel, rows, offset);
        combine(piece, channel);
      }
      store_tile(plane(p_.du, b, channel, piece.begin), rows, steps, u_, kLanes<R>);
      store_tile(plane(p_.ddelta, b, channel, piece.begin), rows, steps, delta_, kLanes<R>);
      if (p_.z) store_tile(plane(p_.dz, b, channel, piece.begin), rows, steps, z_, kLanes<R>);
    });
    if (!p_.constant_B) hand_over(p_.dB, dB_, b, piece);
    if (!p_.constant_C) hand_over(p_.dC, dC_, b, piece);
  }

  // One state: lanes are time.
  void scan_row(int64_t b, const Piece& piece, int64_t channel, R h0) {
    const int steps = piece.steps();
    auto row = [&](const View<3>& x, int64_t channel) {
      return x ? plane(x, b, channel, piece.begin) : Plane{};
    };
    const Plane u = row(p_.u, channel), delta = row(p_.delta, channel / p_.delta_repeat);
    const Plane z = row(p_.z, channel), dz = row(p_.dz, channel), dy = row(p_.dy, channel);
    const Plane du = row(p_.du, channel), ddelta = row(p_.ddelta, channel);
    prefetch(b, piece, channel, 1);
    if (p_.dy && rows_in_place<R>(steps, {u, delta, z, dy, du, ddelta, dz})) {
      with_type(u.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto numbers = [](const Plane& x) { return static_cast<T*>(x.data); };
        walk_along(channel, h0, Row<R, T>{steps, numbers(u), numbers(delta), numbers(z)},
                   RowGrads<R, T>{numbers(dy), numbers(du), numbers(ddelta), numbers(dz)});
      });
      return;
    }
    p_.dy ? void(load_row(dy, steps, dy_)) : clear(dy_, whole_vectors(steps, kLanes<R>));
    walk_along(channel, h0,
               Row<R, R>{steps, load_row(u, steps, u_), load_row(delta, steps, delta_),
                         load_row(z, steps, z_)},
               RowGrads<R, R>{dy_, d_delta_u_, d_delta_, y_});
    store_tile(du, 1, steps, d_delta_u_, 1);
    store_tile(ddelta, 1, steps, d_delta_, 1);
    if (p_.z) store_tile(dz, 1, steps, y_, 1);
  }

  template <class T>
  void walk_along(int64_t channel, R h0, Row<R, T> x, RowGrads<R, T> grads) {
    const int64_t at = channel - c_.begin;
    x.B = B_, x.C = C_;
    x.A = A_[at], x.A_log2e = A_log2e_[at], x.D = D_[at], x.bias = bias_[at];
    x.delta_softplus = p_.delta_softplus;
    grads.dB = dB_, grads.dC = dC_;
    const RowScratch<R> scratch{delta_, slope_, a_, h_, dy_};
    p_.reverse ? walk_row_back<true>(x, h0, dh_[at], scratch, grads)
               : walk_row_back<false>(x, h0, dh_[at], scratch, grads);
    dA_[at] += grads.dA;
    dD_[at] += grads.dD;
    dbias_[at] += grads.dbias;
  }

  // partial[task of the group, b, group, t, :] = sums[t, :]
  void hand_over(void* partial, const R* sums, int64_t b, const Piece& piece) {
    const int64_t row = ((c_.part * p_.batch + b) * p_.groups + c_.group) * p_.seqlen + piece.begin;
    store_tile(Plane{static_cast<R*>(partial) + row * p_.state, p_.compute, 1, p_.state},
               int(p_.state), piece.steps(), sums, pitch_);
  }

  // Always inlined: g++ takes a function that only prefetches for one without effect and drops the call.
  STATESCAN_INLINE void prefetch(int64_t b, const Piece& piece, int64_t channel, int block) {
    for (const View<3>* x : {&p_.u, &p_.delta, &p_.dy, &p_.z}) {
      if (*x && (x != &p_.delta || p_.delta_repeat == 1)) {
        prefetch_next(p_, *x, c_, b, piece, channel, block, p_.reverse ? 1 : -1);
      }
    }
    for (const View<3>* x : {&p_.du, &p_.ddelta, &p_.dz}) {
      if (*x) prefetch_next<true>(p_, *x, c_, b, piece, channel, block, p_.reverse ? 1 : -1);
    }
  }

  void prepare(int64_t b, const Piece& piece, int64_t channel, int rows) {
    const int steps = piece.steps();
    load_tile(plane(p_.u, b, channel, piece.begin), rows, steps, u_, kLanes<R>);
    load_tile(plane(p_.delta, b, 0, piece.begin), rows, steps, delta_, kLanes<R>, p_.delta_repeat,
              channel);
    if (p_.dy) {
      load_tile(plane(p_.dy, b, channel, piece.begin), rows, steps, dy_, kLanes<R>);
    } else {
      clear(dy_, steps * kLanes<R>);
    }
    if (p_.z) load_tile(plane(p_.z, b, channel, piece.begin), rows, steps, z_, kLanes<R>);
    const Vec<R> D = load(D_ + channel - c_.begin), bias = load(bias_ + channel - c_.begin);
    for (int i = 0; i < steps * kLanes<R>; i += kLanes<R>) {
      Vec<R> delta = load(delta_ + i) + bias;
      if (p_.delta_softplus) {
        Vec<R> slope;
        delta = softplus(delta, slope);
        store(slope_ + i, slope);
      }
      const Vec<R> u = load(u_ + i);
      store(delta_ + i, delta);
      store(delta_u_ + i, delta * u);
      store(y_ + i, D * u);
      if (p_.z) {  // z becomes dout silu'(z), which times y is its gradient
        const Vec<R> z = load(z_ + i), dout = load(dy_ + i), gate = sigmoid(z);
        store(dy_ + i, dout * z * gate);
        store(z_ + i, dout * silu_slope(z, gate));
      }
      store(d_delta_ + i, Vec<R>{});
      store(d_delta_u_ + i, Vec<R>{});
    }
  }

  void load_h0(const Segment& segment, const Piece& piece, int64_t channel, int rows) {
    clear(h0_, p_.state * kLanes<R>);
    if (piece.entry) {
      const R* from = static_cast<const R*>(p_.chunk_states) +
                      (segment.batch * p_.chunks() + piece.chunk) * p_.state * p_.dim;
      for (int64_t n = 0; n < p_.state; ++n) {
        store(h0_ + n * kLanes<R>, load_first(from + n * p_.dim + channel, rows));
      }
    } else if (segment.initial_slot >= 0 && p_.initial_state) {  // the first piece of its segment
      load_tile(plane(p_.initial_state, segment.initial_slot, channel, 0), rows, int(p_.state), h0_,
                kLanes<R>);
    }
  }

  void scan(int64_t b, const Piece& piece, int64_t channel, int rows, int64_t offset) {
    const int steps = piece.steps();
    const int first = p_.reverse ? steps - 1 : 0, step = p_.reverse ? -1 : 1;
    auto walk_block = [&](auto size, int64_t n, auto B_is_constant, auto C_is_constant) {
      constexpr int kN = size();
      constexpr bool kB = B_is_constant(), kC = C_is_constant();
      const int64_t table = offset + n * kLanes<R>;
      const BackSteps<R> s{steps,
                           first,
                           step,
                           delta_,
                           delta_u_,
                           dy_,
                           y_,
                           d_delta_,
                           d_delta_u_,
                           A_ + table,
                           A_log2e_ + table,
                           kB ? B_table_ + table : B_ + n,
                           kC ? C_table_ + table : C_ + n,
                           kB ? dB_table_ + table : dB_ + n,
                           kC ? dC_table_ + table : dC_ + n,
                           pitch_,
                           h0_ + n * kLanes<R>,
                           dh_ + table,
                           dA_ + table,
                           h_,
                           a_};
      recompute<R, kN, kB, kC>(s);
      if (!p_.dstates) {
        walk_back<R, kN, kB, kC>(s, [](int, Vec<R>*) {});
        return;
      }
      walk_back<R, kN, kB, kC>(s, [&](int i, Vec<R>* dh) {
        add_dstates(b, piece.begin + first + step * i, channel, rows, n, kN, dh);
      });
    };
    const std::false_type varies;
    const std::true_type constant;
    if (!p_.constant_B && !p_.constant_C) {
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

  void add_dstates(int64_t b, int64_t t, int64_t channel, int rows, int64_t n, int count,
                   Vec<R>* dh) {
    const View<4>& x = p_.dstates;
    for (int i = 0; i < count; ++i) {
      for (int r = 0; r < rows; ++r) {
        dh[i][r] += load_scalar<R>(x.dtype, x.data,
                                   b * x.stride[0] + t * x.stride[1] + (channel + r) * x.stride[2] +
                                       (n + i) * x.stride[3]);
      }
    }
  }

  // The tiles u, delta and z become their own gradients.
  void combine(const Piece& piece, int64_t channel) {
    const Vec<R> D = load(D_ + channel - c_.begin);
    Vec<R> dD{}, dbias{};
    for (int i = 0; i < piece.steps() * kLanes<R>; i += kLanes<R>) {
      const Vec<R> u = load(u_ + i), dy = load(dy_ + i), d_delta_u = load(d_delta_u_ + i);
      Vec<R> d_delta = load(d_delta_ + i) + u * d_delta_u;
      if (p_.delta_softplus) d_delta *= load(slope_ + i);
      store(u_ + i, D * dy + load(delta_ + i) * d_delta_u);
      store(delta_ + i, d_delta);
      dD += dy * u;
      dbias += d_delta;
      if (p_.z) store(z_ + i, load(z_ + i) * load(y_ + i));
    }
    const int64_t at = channel - c_.begin;
    store(dD_ + at, load(dD_ + at) + dD);
    store(dbias_ + at, load(dbias_ + at) + dbias);
  }

  const BwdParams& p_;
  Channels c_;
  int64_t row_group_;
  int pitch_;
  bool lanes_are_time_;
  R *B_, *C_, *dB_, *dC_;                              // (step, pitch)
  R *u_, *delta_, *delta_u_, *slope_, *dy_, *z_, *y_;  // (step, lane)
  R *d_delta_, *d_delta_u_;                            // (step, lane)
  R *A_, *A_log2e_, *dA_, *dh_;                        // (block, state, lane)
  R *B_table_, *C_table_, *dB_table_, *dC_table_, *h0_, *D_, *bias_, *dD_, *dbias_;
  R *h_, *a_;
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
}  // namespace statescan::selective_scan
