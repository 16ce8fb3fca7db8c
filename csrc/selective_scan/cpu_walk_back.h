// The backward's walk over one piece of a sequence: forward once more from the state saved at its
// chunk, keeping h and a of every step, then backward.
#pragma once

#include "selective_scan/cpu_walk.h"

namespace statescan::selective_scan {
namespace STATESCAN_ISA {

// The operands of one piece and one block of states. Steps are counted in the order of the scan,
// from `first` on in the tiles.
template <class R>
struct BackSteps {
  int count, first, step;
  const R *delta, *delta_u, *dy;  // (step, lane)
  R *y, *d_delta, *d_delta_u;     // (step, lane), added to
  const R *A, *A_log2e;           // (state, lane)
  const R *B, *C;                 // (step, pitch) or constant (state, lane)
  R *dB, *dC;                     // likewise, added to
  int pitch;
  const R* h0;  // (state, lane), before the first step
  R *dh, *dA;   // (state, lane): updated; added to
  R *h, *a;     // room for (1 + step, state, lane) and (step, state, lane)
};

// Each channel's share of dB or dC, one vector per step and state, summed over the lanes: kLanes
// vectors at a time, which costs 3 operations for each instead of a horizontal sum.
template <class R, int kN>
class LaneSum {
 public:
  static constexpr int kHeld = kN > kLanes<R> ? kN : kLanes<R>;

  STATESCAN_INLINE Vec<R>& share(int n) { return held_[used_ + n]; }

  // The shares of one step are complete; `out` is that step's row of sums.
  STATESCAN_INLINE void step_done(R* out) {
    row_[used_ / kN] = out;
    used_ += kN;
    if (used_ == kHeld) flush();
  }

  STATESCAN_INLINE void flush() {
    if (used_ == 0) return;
    for (int i = used_; i < kHeld; ++i) held_[i] = Vec<R>{};
    if constexpr (kN >= kLanes<R>) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; n += kLanes<R>) {
        store(row_[0] + n, load(row_[0] + n) + sum_lanes<R>(held_ + n));
      }
    } else {
      const Vec<R> sums = sum_lanes<R>(held_);
      for (int i = 0; i < used_; ++i) row_[i / kN][i % kN] += sums[i];
    }
    used_ = 0;
  }

 private:
  Vec<R> held_[kHeld];
  R* row_[kHeld / kN];
  int used_ = 0;
};

// h and a of every step, and y for the gate.
template <class R, int kN, bool kConstantB, bool kConstantC>
STATESCAN_INLINE void recompute(const BackSteps<R>& s) {
  constexpr int kStates = kN * kLanes<R>;
  Vec<R> h[kN];
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) {
    h[n] = load(s.h0 + n * kLanes<R>);
    store(s.h + n * kLanes<R>, h[n]);
  }
  for (int i = 0; i < s.count; ++i) {
    const int t = s.first + s.step * i;
    const R* B = kConstantB ? s.B : s.B + t * s.pitch;
    const R* C = kConstantC ? s.C : s.C + t * s.pitch;
    const Vec<R> delta = load(s.delta + t * kLanes<R>), delta_u = load(s.delta_u + t * kLanes<R>);
    Vec<R> y = load(s.y + t * kLanes<R>), y_odd{};
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const Vec<R> a = decay(delta, load(s.A_log2e + n * kLanes<R>));
      h[n] = next_state(a, h[n], delta_u, coefficient<R, kConstantB>(B, n));
      store(s.a + i * kStates + n * kLanes<R>, a);
      store(s.h + (i + 1) * kStates + n * kLanes<R>, h[n]);
      Vec<R>& sum = n % 2 ? y_odd : y;
      sum += coefficient<R, kConstantC>(C, n) * h[n];
    }
    store(s.y + t * kLanes<R>, y + y_odd);
  }
}

// `add_dstates(i, dh)` adds the gradients of the states returned after step i.
template <class R, int kN, bool kConstantB, bool kConstantC, class AddDStates>
STATESCAN_INLINE void walk_back(const BackSteps<R>& s, AddDStates&& add_dstates) {
  constexpr int kStates = kN * kLanes<R>;
  Vec<R> dh[kN];
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) dh[n] = load(s.dh + n * kLanes<R>);
  LaneSum<R, kN> dB_sum, dC_sum;
  for (int i = s.count - 1; i >= 0; --i) {
    const int t = s.first + s.step * i;
    const R* B = kConstantB ? s.B : s.B + t * s.pitch;
    const R* C = kConstantC ? s.C : s.C + t * s.pitch;
    const Vec<R> delta = load(s.delta + t * kLanes<R>), delta_u = load(s.delta_u + t * kLanes<R>);
    const Vec<R> dy = load(s.dy + t * kLanes<R>);
    Vec<R> d_delta = load(s.d_delta + t * kLanes<R>);
    Vec<R> d_delta_u = load(s.d_delta_u + t * kLanes<R>);
    add_dstates(i, dh);
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      Vec<R> dA = load(s.dA + n * kLanes<R>), dB, dC;
      step_vjp(load(s.a + i * kStates + n * kLanes<R>), load(s.h + i * kStates + n * kLanes<R>),
               load(s.h + (i + 1) * kStates + n * kLanes<R>), delta, delta_u,
               load(s.A + n * kLanes<R>), coefficient<R, kConstantB>(B, n),
               coefficient<R, kConstantC>(C, n), dy, dh[n], dA, dB, dC, d_delta, d_delta_u);
      store(s.dA + n * kLanes<R>, dA);
      if constexpr (kConstantB) {
        store(s.dB + n * kLanes<R>, load(s.dB + n * kLanes<R>) + dB);
      } else {
        dB_sum.share(n) = dB;
      }
      if constexpr (kConstantC) {
        store(s.dC + n * kLanes<R>, load(s.dC + n * kLanes<R>) + dC);
      } else {
        dC_sum.share(n) = dC;
      }
    }
    if constexpr (!kConstantB) dB_sum.step_done(s.dB + t * s.pitch);
    if constexpr (!kConstantC) dC_sum.step_done(s.dC + t * s.pitch);
    store(s.d_delta + t * kLanes<R>, d_delta);
    store(s.d_delta_u + t * kLanes<R>, d_delta_u);
  }
  dB_sum.flush();
  dC_sum.flush();
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) store(s.dh + n * kLanes<R>, dh[n]);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::selective_scan
