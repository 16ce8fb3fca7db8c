// Forward of the selective scan along routes on the CPU. See cpu_walk.h for who does what.
#include "selective_scan_2d/cpu_walk.h"

namespace statescan::selective_scan_2d {
namespace STATESCAN_ISA {
namespace {

using selective_scan::decay;
using selective_scan::next_state;

// The operands of one piece and one block of states.
template <class R>
struct Steps {
  int count;
  const int32_t* at;  // (step): where in u and y
  const R* delta;     // (step, lane)
  const R* u;         // (token, lane)
  R* y;               // (token, lane), added to
  const R* A;         // (state, lane), times log2(e)
  const R *B, *C;     // (state, kPitch)
  R* h;               // (state, lane)
};

// Walks kN states of a block of channels along a piece. y gets weight (C h + D u).
template <class R, int kN>
STATESCAN_INLINE void walk(const Steps<R>& s, Vec<R> D, Vec<R> weight) {
  Vec<R> h[kN];
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) h[n] = load(s.h + n * kLanes<R>);
  for (int i = 0; i < s.count; ++i) {
    const int64_t at = s.at[i];
    const Vec<R> delta = load(s.delta + i * kLanes<R>), u = load(s.u + at), delta_u = delta * u;
    Vec<R> y = D * u, y_odd{};
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const Vec<R> a = decay(delta, load(s.A + n * kLanes<R>));
      h[n] = next_state(a, h[n], delta_u, s.B[n * kPitch + i]);
      Vec<R>& sum = n % 2 ? y_odd : y;  // two sums halve the wait of an addition for the one before
      sum += s.C[n * kPitch + i] * h[n];
    }
    if constexpr (kN > 1) y += y_odd;
    store(s.y + at, load(s.y + at) + weight * y);
  }
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) store(s.h + n * kLanes<R>, h[n]);
}

template <class R>
class Forward {
 public:
  Forward(const FwdParams& p, void* memory) : p_(p), scratch_(memory), x_(p, scratch_) {
    u_ = scratch_.take<R>((p.tokens + 1) * kLanes<R>);
    y_ = scratch_.take<R>((p.tokens + 1) * kLanes<R>);
    h_ = scratch_.take<R>(p.state * kLanes<R>);
    z_ = scratch_.take<R>(kMaxChunk * kLanes<R>);
  }

  void run(int64_t task) {
    batch_ = task / p_.channel_tasks();
    const int64_t begin = task % p_.channel_tasks() * FwdParams::kTaskChannels;
    const int64_t end =
        begin + FwdParams::kTaskChannels < p_.dim ? begin + FwdParams::kTaskChannels : p_.dim;
    for (channel_ = begin; channel_ < end; channel_ += kLanes<R>) {
      rows_ = end - channel_ < kLanes<R> ? int(end - channel_) : kLanes<R>;
      run_block();
    }
  }

 private:
  void run_block() {
    if (!p_.u_per_route) load_u(0);
    if (!p_.y_per_route) clear(y_, (p_.tokens + 1) * kLanes<R>);
    for (int64_t route = 0; route < p_.routes; ++route) {
      if (p_.u_per_route) load_u(route);
      if (p_.y_per_route) clear(y_, (p_.tokens + 1) * kLanes<R>);
      run_route(route);
      if (p_.y_per_route) store_y(route);
    }
    if (p_.y_per_route) return;
    if (p_.z) gate();
    store_y(0);
  }

  void load_u(int64_t route) {
    load_tokens(plane(p_.u, batch_, route, channel_, 0), rows_, p_.tokens, u_);
  }

  void store_y(int64_t route) {
    store_tile(plane(p_.y, batch_, route, channel_, 0), rows_, int(p_.tokens), y_, kLanes<R>);
  }

  void run_route(int64_t route) {
    x_.begin_route(route, channel_, rows_);
    if (route == 0 || !p_.carry) {
      clear(h_, p_.state * kLanes<R>);
      if (p_.initial_state) {
        load_tile(plane(p_.initial_state, batch_, route, channel_, 0), rows_, int(p_.state), h_,
                  kLanes<R>);
      }
    } else if (p_.reset_period > 0) {
      clear(h_, p_.state * kLanes<R>);
    }
    for (int64_t begin = 0; begin < p_.steps;) {
      const int64_t end = piece_end(p_, begin);
      if (p_.resets_at(begin)) clear(h_, p_.state * kLanes<R>);
      if (p_.chunk_states != nullptr && begin % p_.chunk == 0) save(route, begin / p_.chunk);
      run_piece(route, begin, int(end - begin));
      begin = end;
    }
    if (p_.carry && route != p_.routes - 1) return;
    store_tile(plane(p_.last_state, batch_, p_.carry ? 0 : route, channel_, 0), rows_,
               int(p_.state), h_, kLanes<R>);
  }

  // chunk_states[batch, route, chunk, :, channel..] = h
  void save(int64_t route, int64_t chunk) {
    const int64_t row = (batch_ * p_.routes + route) * p_.chunks() + chunk;
    R* to = static_cast<R*>(p_.chunk_states) + row * p_.state * p_.dim + channel_;
    for (int64_t n = 0; n < p_.state; ++n) {
      store_first(to + n * p_.dim, load(h_ + n * kLanes<R>), rows_);
    }
  }

  void run_piece(int64_t route, int64_t begin, int steps) {
    x_.template begin_piece<false>(batch_, route, begin, steps, channel_, rows_);
    const int64_t next = begin + steps, left = p_.steps - next;
    x_.prefetch(batch_, route, next, int(left < kMaxChunk ? left : kMaxChunk));
    // double serves gradient checks: fewer block sizes keep it small
    for_state_blocks<std::is_same_v<R, float> ? 16 : 4>(0, p_.state, [&](auto size, int64_t n) {
      const Steps<R> s{steps,
                       x_.at,
                       x_.delta,
                       u_,
                       y_,
                       x_.A_log2e + n * kLanes<R>,
                       x_.B + n * kPitch,
                       x_.C + n * kPitch,
                       h_ + n * kLanes<R>};
      walk<R, size()>(s, n == 0 ? x_.D : Vec<R>{}, x_.weight);
    });
  }

  void gate() {
    const Plane z = statescan::plane(p_.z, batch_, channel_, 0);
    for_token_pieces(p_.tokens, [&](int64_t first, int count) {
      load_tile(z.at(0, first), rows_, count, z_, kLanes<R>);
      R* y = y_ + first * kLanes<R>;
      for (int i = 0; i < count * kLanes<R>; i += kLanes<R>) {
        store(y + i, load(y + i) * silu(load(z_ + i)));
      }
    });
  }

  const FwdParams& p_;
  Scratch scratch_;
  Operands<R> x_;
  int64_t batch_, channel_;
  int rows_;
  R *u_, *y_;  // (token, lane)
  R *h_, *z_;  // (state, lane), (token of a piece, lane)
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
}  // namespace statescan::selective_scan_2d
