// How the backward walks one piece of a route for one block of states: forward once more, then back.
#pragma once

#include "selective_scan_2d/cpu_walk.h"

namespace statescan::selective_scan_2d {
namespace STATESCAN_ISA {
namespace {

using selective_scan::decay;
using selective_scan::next_state;
using selective_scan::step_vjp;

// The operands of one piece and one block of states.
template <class R>
struct Steps {
  int count;
  const int32_t* at;           // (step): where in u, dy and y
  const R *delta, *u, *dy;     // (step, lane), (token, lane), (token, lane)
  R *y, *d_delta, *d_delta_u;  // (token, lane), (step, lane), (step, lane), added to
  const R *A, *A_log2e;        // (state, lane)
  const R *B, *C;              // (state, kPitch)
  R *dB, *dC;                  // (step, state), the sums over the lanes
  int64_t states;              // elements from one step of dB and dC to the next
  bool add;                    // to what is in dB and dC
  const R* h0;                 // (state, lane), before the first step
  R *dh, *dA;                  // (state, lane): updated; added to
  R *h, *a;                    // room for (1 + step, state, lane) and (step, state, lane)
};

// Each channel's share of dB or dC, one vector per step and state, summed over the lanes: kLanes
// vectors at a time, which costs 3 operations for each instead of a horizontal sum. Steps come from
// the last to the first.
template <class R, int kN>
class LaneSum {
 public:
  static constexpr int kHeld = kN > kLanes<R> ? kN : kLanes<R>;
  static constexpr int kSteps = kHeld / kN;

  LaneSum(R* out, const Steps<R>& s) : out_(out), s_(s) {}

  STATESCAN_INLINE Vec<R>& share(int i, int n) { return held_[i % kSteps * kN + n]; }

  // The shares of step i are complete.
  STATESCAN_INLINE void step_done(int i) {
    if (i % kSteps != 0) return;
    R* out = out_ + i * s_.states;
    if constexpr (kN >= kLanes<R>) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; n += kLanes<R>) put(out + n, sum_lanes<R>(held_ + n), kLanes<R>);
    } else {
      const int steps = s_.count - i < kSteps ? s_.count - i : kSteps;
      const Vec<R> sums = sum_lanes<R>(held_);
      if (s_.states == kN) return put(out, sums, steps * kN);
      for (int j = 0; j < steps; ++j) {
        for (int n = 0; n < kN; ++n) {
          R& sum = out[j * s_.states + n];
          sum = s_.add ? sum + sums[j * kN + n] : sums[j * kN + n];
        }
      }
    }
  }

 private:
  STATESCAN_INLINE void put(R* out, Vec<R> sums, int count) {
    store_first(out, s_.add ? load_first(out, count) + sums : sums, count);
  }

  Vec<R> held_[kHeld];
  R* out_;
  const Steps<R>& s_;
};

// h and a of every step; for kWantY also y, and dweight, its product with dy summed over the steps.
template <class R, int kN, bool kWantY>
STATESCAN_INLINE void recompute(const Steps<R>& s, Vec<R> D, Vec<R> weight, R* dweight) {
  constexpr int kStates = kN * kLanes<R>;
  Vec<R> h[kN];
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) {
    h[n] = load(s.h0 + n * kLanes<R>);
    store(s.h + n * kLanes<R>, h[n]);
  }
  Vec<R> y_dy{};
  for (int i = 0; i < s.count; ++i) {
    const Vec<R> delta = load(s.delta + i * kLanes<R>), u = load(s.u + s.at[i]);
    const Vec<R> delta_u = delta * u;
    Vec<R> y = D * u;
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const Vec<R> a = decay(delta, load(s.A_log2e + n * kLanes<R>));
      h[n] = next_state(a, h[n], delta_u, s.B[n * kPitch + i]);
      store(s.a + i * kStates + n * kLanes<R>, a);
      store(s.h + (i + 1) * kStates + n * kLanes<R>, h[n]);
      if constexpr (kWantY) y += s.C[n * kPitch + i] * h[n];
    }
    if constexpr (kWantY) {
      store(s.y + s.at[i], load(s.y + s.at[i]) + weight * y);
      y_dy += y * load(s.dy + s.at[i]);
    }
  }
  if constexpr (kWantY) store(dweight, load(dweight) + y_dy);
}

template <class R, int kN>
STATESCAN_INLINE void walk_back(const Steps<R>& s, Vec<R> weight) {
  constexpr int kStates = kN * kLanes<R>;
  Vec<R> dh[kN];
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) dh[n] = load(s.dh + n * kLanes<R>);
  LaneSum<R, kN> dB_sum(s.dB, s), dC_sum(s.dC, s);
  for (int i = s.count - 1; i >= 0; --i) {
    const Vec<R> delta = load(s.delta + i * kLanes<R>), delta_u = delta * load(s.u + s.at[i]);
    const Vec<R> dy = weight * load(s.dy + s.at[i]);
    Vec<R> d_delta = load(s.d_delta + i * kLanes<R>);
    Vec<R> d_delta_u = load(s.d_delta_u + i * kLanes<R>);
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      Vec<R> dA = load(s.dA + n * kLanes<R>);
      step_vjp(load(s.a + i * kStates + n * kLanes<R>), load(s.h + i * kStates + n * kLanes<R>),
               load(s.h + (i + 1) * kStates + n * kLanes<R>), delta, delta_u,
               load(s.A + n * kLanes<R>), s.B[n * kPitch + i], s.C[n * kPitch + i], dy, dh[n], dA,
               dB_sum.share(i, n), dC_sum.share(i, n), d_delta, d_delta_u);
      store(s.dA + n * kLanes<R>, dA);
    }
    dB_sum.step_done(i);
    dC_sum.step_done(i);
    store(s.d_delta + i * kLanes<R>, d_delta);
    store(s.d_delta_u + i * kLanes<R>, d_delta_u);
  }
#pragma GCC unroll 16
  for (int n = 0; n < kN; ++n) store(s.dh + n * kLanes<R>, dh[n]);
}

}  // namespace
}  // namespace STATESCAN_ISA
}  // namespace statescan::selective_scan_2d
