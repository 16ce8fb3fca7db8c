// Backward of the selective scan along routes on the CPU. Each piece is walked forward once more from
// the state saved at its chunk, keeping h and a of every step, then backward. See cpu_walk.h for who
// does what.
#include "selective_scan_2d/cpu_walk_back.h"

namespace statescan::selective_scan_2d {
namespace STATESCAN_ISA {
namespace {

template <class R>
class Backward {
 public:
  Backward(const BwdParams& p, void* memory) : p_(p), scratch_(memory), x_(p, scratch_) {
    for (R** tile : {&u_, &dy_, &du_, &y_}) *tile = scratch_.take<R>((p.tokens + 1) * kLanes<R>);
    ddelta_ = scratch_.take<R>(p.delta_shared ? p.steps * kLanes<R> : 0);
    for (R** states : {&h0_, &dh_}) *states = scratch_.take<R>(p.state * kLanes<R>);
    dA_ = scratch_.take<R>(p.routes * p.state * kLanes<R>);
    ddt_weight_ = scratch_.take<R>(p.routes * p.rank * kLanes<R>);
    for (R** x : {&dD_, &dbias_, &dweight_}) *x = scratch_.take<R>(p.routes * kLanes<R>);
    for (R** x : {&d_delta_, &d_delta_u_, &z_}) *x = scratch_.take<R>(kMaxChunk * kLanes<R>);
    const int64_t held = (p.state < 16 ? p.state : 16) * kLanes<R>;
    h_ = scratch_.take<R>((kMaxChunk + 1) * held);
    a_ = scratch_.take<R>(kMaxChunk * held);
  }

  void run(int64_t task) {
    part_ = task % p_.channel_tasks();
    row_group_ = task / p_.channel_tasks();
    const int64_t first = p_.batch * row_group_ / p_.row_groups();
    const int64_t last = p_.batch * (row_group_ + 1) / p_.row_groups();
    const int64_t begin = p_.first_channel(part_), end = p_.first_channel(part_ + 1);
    for (channel_ = begin; channel_ < end; channel_ += kLanes<R>) {
      rows_ = end - channel_ < kLanes<R> ? int(end - channel_) : kLanes<R>;
      add_ = channel_ > begin;
      begin_block();
      for (batch_ = first; batch_ < last; ++batch_) run_batch();
      finish_block();
    }
  }

 private:
  void begin_block() {
    clear(dA_, p_.routes * p_.state * kLanes<R>);
    clear(ddt_weight_, p_.routes * p_.rank * kLanes<R>);
    for (R* x : {dD_, dbias_, dweight_}) clear(x, p_.routes * kLanes<R>);
  }

  // Hands over what was summed over the batch elements of this task.
  void finish_block() {
    for (int64_t route = 0; route < p_.routes; ++route) {
      const int64_t row = (row_group_ * p_.routes + route) * p_.dim + channel_;
      auto table = [&](void* to, const R* from, int64_t count) {
        store_tile(Plane{static_cast<R*>(to) + row * count, p_.compute, count, 1}, rows_,
                   int(count), from + route * count * kLanes<R>, kLanes<R>);
      };
      table(p_.dA, dA_, p_.state);
      if (p_.rank > 0) table(p_.ddt_weight, ddt_weight_, p_.rank);
      if (p_.D) table(p_.dD, dD_, 1);
      if (p_.delta_bias) table(p_.ddelta_bias, dbias_, 1);
      if (p_.weights) table(p_.dweights, dweight_, 1);
    }
  }

  void run_batch() {
    const int64_t tile = (p_.tokens + 1) * kLanes<R>;
    if (p_.delta_shared) clear(ddelta_, p_.steps * kLanes<R>);
    if (p_.z) clear(y_, tile);
    if (!p_.u_per_route) load_u(0), clear(du_, tile);
    if (!p_.y_per_route) load_dy(0);
    for (int64_t route = p_.routes; route-- > 0;) {
      if (p_.u_per_route) load_u(route), clear(du_, tile);
      if (p_.y_per_route) load_dy(route);
      run_route(route);
      if (p_.u_per_route) store_du(route);
    }
    if (!p_.u_per_route) store_du(0);
    if (p_.z) store_dz();
    if (p_.rank == 0 && p_.delta_shared) {
      store_tile(plane(p_.ddelta, batch_, 0, channel_, 0), rows_, int(p_.steps), ddelta_,
                 kLanes<R>);
    }
  }

  void load_u(int64_t route) {
    load_tokens(plane(p_.u, batch_, route, channel_, 0), rows_, p_.tokens, u_);
  }

  void store_du(int64_t route) {
    store_tile(plane(p_.du, batch_, route, channel_, 0), rows_, int(p_.tokens), du_, kLanes<R>);
  }

  // The gradient of y before the gate.
  void load_dy(int64_t route) {
    if (!p_.dy) return clear(dy_, (p_.tokens + 1) * kLanes<R>);
    load_tokens(plane(p_.dy, batch_, route, channel_, 0), rows_, p_.tokens, dy_);
    if (!p_.z) return;
    const Plane z = statescan::plane(p_.z, batch_, channel_, 0);
    for_token_pieces(p_.tokens, [&](int64_t first, int count) {
      load_tile(z.at(0, first), rows_, count, z_, kLanes<R>);
      R* dy = dy_ + first * kLanes<R>;
      for (int i = 0; i < count * kLanes<R>; i += kLanes<R>) {
        store(dy + i, load(dy + i) * silu(load(z_ + i)));
      }
    });
  }

  // dz = dout y silu'(z): y is there now, and dout comes in once more, in place of dy.
  void store_dz() {
    if (!p_.dy) {
      clear(dy_, p_.tokens * kLanes<R>);
    } else {
      load_tokens(plane(p_.dy, batch_, 0, channel_, 0), rows_, p_.tokens, dy_);
    }
    const Plane z = statescan::plane(p_.z, batch_, channel_, 0);
    const Plane dz = statescan::plane(p_.dz, batch_, channel_, 0);
    for_token_pieces(p_.tokens, [&](int64_t first, int count) {
      load_tile(z.at(0, first), rows_, count, z_, kLanes<R>);
      const R *y = y_ + first * kLanes<R>, *dout = dy_ + first * kLanes<R>;
      for (int i = 0; i < count * kLanes<R>; i += kLanes<R>) {
        const Vec<R> z_i = load(z_ + i), slope = silu_slope(z_i, sigmoid(z_i));
        store(z_ + i, load(dout + i) * load(y + i) * slope);
      }
      store_tile(dz.at(0, first), rows_, count, z_, kLanes<R>);
    });
  }

  void run_route(int64_t route) {
    x_.begin_route(route, channel_, rows_);
    if (route == p_.routes - 1 || !p_.carry) {
      clear(dh_, p_.state * kLanes<R>);
      if (p_.dlast_state) {
        load_tile(plane(p_.dlast_state, batch_, p_.carry ? 0 : route, channel_, 0), rows_,
                  int(p_.state), dh_, kLanes<R>);
      }
    } else if (p_.reset_period > 0) {
      clear(dh_, p_.state * kLanes<R>);
    }
    for (int64_t end = p_.steps; end > 0;) {
      const int64_t begin = piece_begin(p_, end);
      run_piece(route, begin, int(end - begin));
      if (p_.resets_at(begin)) clear(dh_, p_.state * kLanes<R>);
      end = begin;
    }
    if (!p_.dinitial_state || (p_.carry && route > 0)) return;
    store_tile(plane(p_.dinitial_state, batch_, route, channel_, 0), rows_, int(p_.state), dh_,
               kLanes<R>);
  }

  void run_piece(int64_t route, int64_t begin, int steps) {
    x_.template begin_piece<true>(batch_, route, begin, steps, channel_, rows_);
    const int before = int(begin < kMaxChunk ? begin : kMaxChunk);
    x_.prefetch(batch_, route, begin - before, before);
    if (add_) prefetch_partials(route, begin - before, before);
    load_h0(route, begin);
    clear(d_delta_, steps * kLanes<R>);
    clear(d_delta_u_, steps * kLanes<R>);
    scan(route, begin, steps);
    combine(route, steps);
    if (p_.rank > 0) {
      add_to_dt_weight(route, steps);
      add_to_dt(route, begin, steps);
    } else if (p_.delta_shared) {
      R* sum = ddelta_ + begin * kLanes<R>;
      for (int i = 0; i < steps * kLanes<R>; i += kLanes<R>) {
        store(sum + i, load(sum + i) + load(x_.delta + i));
      }
    } else {
      store_tile(plane(p_.ddelta, batch_, route, channel_, begin), rows_, steps, x_.delta,
                 kLanes<R>);
    }
  }

  // The state before the piece: the saved one, or where the state starts anew within a chunk, zero.
  void load_h0(int64_t route, int64_t begin) {
    if (begin % p_.chunk != 0) return clear(h0_, p_.state * kLanes<R>);
    const int64_t row = (batch_ * p_.routes + route) * p_.chunks() + begin / p_.chunk;
    const R* from = static_cast<const R*>(p_.chunk_states) + row * p_.state * p_.dim + channel_;
    for (int64_t n = 0; n < p_.state; ++n) {
      store(h0_ + n * kLanes<R>, load_first(from + n * p_.dim, rows_));
    }
  }

  // Where the partial sums of dB, dC (per = state) or ddt (per = rank) of this task and route begin.
  R* partial(void* sums, int64_t route, int64_t per) const {
    const int64_t row = (part_ * p_.routes + route) * p_.batch + batch_;
    return static_cast<R*>(sums) + row * p_.steps * per;
  }

  void scan(int64_t route, int64_t begin, int steps) {
    R* dB = partial(p_.dB, route, p_.state) + begin * p_.state;
    R* dC = partial(p_.dC, route, p_.state) + begin * p_.state;
    for_state_blocks<std::is_same_v<R, float> ? 16 : 4>(0, p_.state, [&](auto size, int64_t n) {
      const Steps<R> s{steps,
                       x_.at,
                       x_.delta,
                       u_,
                       dy_,
                       y_,
                       d_delta_,
                       d_delta_u_,
                       x_.A + n * kLanes<R>,
                       x_.A_log2e + n * kLanes<R>,
                       x_.B + n * kPitch,
                       x_.C + n * kPitch,
                       dB + n,
                       dC + n,
                       p_.state,
                       add_,
                       h0_ + n * kLanes<R>,
                       dh_ + n * kLanes<R>,
                       dA_ + (route * p_.state + n) * kLanes<R>,
                       h_,
                       a_};
      const Vec<R> D = n == 0 ? x_.D : Vec<R>{};
      if (p_.z || p_.weights) {
        recompute<R, size(), true>(s, D, x_.weight, dweight_ + route * kLanes<R>);
      } else {
        recompute<R, size(), false>(s, D, x_.weight, nullptr);
      }
      walk_back<R, size()>(s, x_.weight);
    });
  }

  // The tile delta becomes its own gradient, before bias and softplus.
  void combine(int64_t route, int steps) {
    // Local copies: a store of floats might change the members, for all the compiler knows.
    const R *u = u_, *dy = dy_, *slope = x_.slope;
    const R *d_delta = d_delta_, *d_delta_u = d_delta_u_;
    R *du = du_, *delta = x_.delta;
    const int32_t* at = x_.at;
    const Vec<R> D = x_.D, weight = x_.weight;
    Vec<R> dD{}, dbias{};
    for (int i = 0; i < steps; ++i) {
      const Vec<R> u_i = load(u + at[i]), dy_i = weight * load(dy + at[i]);
      const Vec<R> d_delta_u_i = load(d_delta_u + i * kLanes<R>);
      const Vec<R> ddelta =
          (load(d_delta + i * kLanes<R>) + u_i * d_delta_u_i) * load(slope + i * kLanes<R>);
      const Vec<R> du_i = D * dy_i + load(delta + i * kLanes<R>) * d_delta_u_i;
      store(du + at[i], load(du + at[i]) + du_i);
      store(delta + i * kLanes<R>, ddelta);
      dD += dy_i * u_i;
      dbias += ddelta;
    }
    R *dD_sum = dD_ + route * kLanes<R>, *dbias_sum = dbias_ + route * kLanes<R>;
    store(dD_sum, load(dD_sum) + dD);
    store(dbias_sum, load(dbias_sum) + dbias);
  }

  // ddt_weight += sum over the steps of ddelta dt
  void add_to_dt_weight(int64_t route, int steps) {
    R* sums = ddt_weight_ + route * p_.rank * kLanes<R>;
    const R* ddelta = x_.delta;
    for_state_blocks<8>(0, p_.rank, [&](auto size, int64_t r) {
      const R* dt = x_.dt + r * kPitch;
      Vec<R> sum[size()];
      for (int j = 0; j < size(); ++j) sum[j] = load(sums + (r + j) * kLanes<R>);
      for (int i = 0; i < steps; ++i) {
        const Vec<R> ddelta_i = load(ddelta + i * kLanes<R>);
        for (int j = 0; j < size(); ++j) sum[j] += ddelta_i * dt[j * kPitch + i];
      }
      for (int j = 0; j < size(); ++j) store(sums + (r + j) * kLanes<R>, sum[j]);
    });
  }

  // ddt = sum over the channels of ddelta dt_weight. A product of two matrices, once ddelta is
  // transposed: that leaves one multiply-add for each step, channel and rank.
  void add_to_dt(int64_t route, int64_t begin, int steps) {
    R* sums = partial(p_.ddt, route, p_.rank) + begin;
    const R *from = x_.delta, *weights = x_.dt_weight;
    const int64_t rank = p_.rank, pitch = p_.steps;
    const bool add = add_;
    for (int i = 0; i < steps; i += kLanes<R>) {
      const int count = steps - i < kLanes<R> ? steps - i : kLanes<R>;
      Vec<R> ddelta[kLanes<R>];
      for (int j = 0; j < kLanes<R>; ++j) {  // there is room beyond the last step
        ddelta[j] = load(from + (i + j) * kLanes<R>);
      }
      transpose<R>(ddelta);
      for (int64_t r = 0; r < rank; ++r) {
        const R* w = weights + r * kLanes<R>;
        Vec<R> even{}, odd{};
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<R>; lane += 2) {
          even += ddelta[lane] * w[lane];
          odd += ddelta[lane + 1] * w[lane + 1];
        }
        R* out = sums + r * pitch + i;
        even += odd;
        if (count == kLanes<R>) {
          store(out, add ? load(out) + even : even);
        } else {
          store_first(out, add ? load_first(out, count) + even : even, count);
        }
      }
    }
  }

  // Asks for the partial sums that the piece before this one will add to.
  void prefetch_partials(int64_t route, int64_t begin, int steps) {
    auto ask = [&](void* sums, int64_t offset, int64_t per, int rows, int count) {
      prefetch_tile(Plane{partial(sums, route, per) + offset, p_.compute, p_.steps, 1}, rows,
                    count);
    };
    for (void* sums : {p_.dB, p_.dC}) {
      ask(sums, begin * p_.state, p_.state, 1, int(steps * p_.state));
    }
    if (p_.rank > 0) ask(p_.ddt, begin, p_.rank, int(p_.rank), steps);
  }

  const BwdParams& p_;
  Scratch scratch_;
  Operands<R> x_;
  int64_t part_, row_group_, batch_, channel_;
  int rows_;
  bool add_;                      // to the partial sums: not the first block of the task
  R *u_, *dy_, *du_, *y_;         // (token, lane)
  R* ddelta_;                     // (step, lane), summed over the routes
  R *h0_, *dh_;                   // (state, lane)
  R *dA_, *ddt_weight_;           // (route, state, lane), (route, rank, lane)
  R *dD_, *dbias_, *dweight_;     // (route, lane)
  R *d_delta_, *d_delta_u_, *z_;  // (step, lane)
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
}  // namespace statescan::selective_scan_2d
