// One state per channel and operands that lie along time: lanes are time. Nothing is transposed;
// the recurrence inside a vector is a prefix of compositions.
//
// A step is the map h -> a h + b, and two steps are one again:
//
//   (a, b) after (a', b')  =  (a a', a b' + b)
//
// Sklansky's tree finds all prefixes of n steps in log2(n) rounds. In each, the upper half of a run
// of lanes is composed with the last lane of its lower half:
//
//   lane       0 1 2 3 4 5 6 7
//   round 1      0   2   4   6        every lane ends up with the same tree below it as its
//   round 2        1 1     5 5        neighbour: a step that changes nothing, (1, 0), leaves the
//   round 3            3 3 3 3        state as it is, bit for bit.
#pragma once

#include <initializer_list>

#include "selective_scan/cpu_walk.h"

namespace statescan::selective_scan {
namespace STATESCAN_ISA {

// Of every run of 2 kBlock lanes the half that comes later in the walk becomes the last lane of the
// other half; that other half becomes `rest`. Backwards, a walk begins at the last lane.
template <class R, int kBlock, bool kBackwards, int... kLane>
STATESCAN_INLINE Vec<R> spread_half(Vec<R> x, Vec<R> rest, std::integer_sequence<int, kLane...>) {
  return shuffle(x, rest,
                 std::integer_sequence<int, (bool(kLane & kBlock) == kBackwards
                                                 ? kLanes<R> + kLane
                                                 : ((kLane & -2 * kBlock) |
                                                    (kBackwards ? kBlock : kBlock - 1)))...>{});
}

// The step of each lane becomes the composition of all steps up to it in the order of the walk.
template <class R, bool kBackwards, int kBlock = 1>
STATESCAN_INLINE void compose_prefix(Vec<R>& a, Vec<R>& b) {
  if constexpr (kBlock < kLanes<R>) {
    const auto lanes = std::make_integer_sequence<int, kLanes<R>>{};
    const Vec<R> a_before = spread_half<R, kBlock, kBackwards>(a, splat(R(1)), lanes);
    const Vec<R> b_before = spread_half<R, kBlock, kBackwards>(b, Vec<R>{}, lanes);
    b = a * b_before + b;
    a = a * a_before;
    compose_prefix<R, kBackwards, 2 * kBlock>(a, b);
  }
}

// Lane `kFrom` everywhere.
template <class R, int kFrom, int... kLane>
STATESCAN_INLINE Vec<R> spread_lane(Vec<R> x, std::integer_sequence<int, kLane...>) {
  return shuffle(x, x, std::integer_sequence<int, (kLane * 0 + kFrom)...>{});
}

// The state after each of kLanes steps. `h` is the state before the first, everywhere, and leaves as
// the state after the last.
template <class R, bool kBackwards>
STATESCAN_INLINE Vec<R> next_states(Vec<R> a, Vec<R> b, Vec<R>& h) {
  compose_prefix<R, kBackwards>(a, b);
  const Vec<R> states = a * h + b;
  h = spread_lane<R, kBackwards ? 0 : kLanes<R> - 1>(states,
                                                     std::make_integer_sequence<int, kLanes<R>>{});
  return states;
}

// Each lane takes the number of the lane before it in the order of the walk, the first one that of
// `before`, the same in all lanes.
template <class R, bool kBackwards, int... kLane>
STATESCAN_INLINE Vec<R> shift_in(Vec<R> x, Vec<R> before, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<R>;
  return shuffle(x, before,
                 std::integer_sequence<int, (kBackwards  ? kLane + 1
                                             : kLane > 0 ? kLane - 1
                                                         : 2 * n - 1)...>{});
}

template <class R, bool kBackwards>
STATESCAN_INLINE Vec<R> shift_in(Vec<R> x, Vec<R> before) {
  return shift_in<R, kBackwards>(x, before, std::make_integer_sequence<int, kLanes<R>>{});
}

// Steps in whole vectors. What lies behind the last step in a row must leave the state alone.
STATESCAN_INLINE int whole_vectors(int steps, int lanes) {
  return (steps + lanes - 1) / lanes * lanes;
}

template <class R>
STATESCAN_INLINE void clear_behind(R* row, int steps) {
  for (int i = steps; i < whole_vectors(steps, kLanes<R>); ++i) row[i] = 0;
}

// Worth it for rows that are read as they are; channel-last ones are better read a step at a time.
STATESCAN_INLINE bool lanes_can_be_time(const Problem& p, std::initializer_list<View<3>> operands) {
  if (p.state != 1 || p.constant_B || p.constant_C) return false;
  for (const View<3>& x : operands) {
    if (x && x.stride[2] != 1) return false;
  }
  return true;
}

// One row of a tensor as numbers side by side, zeros up to a whole vector; nothing, if it is absent.
template <class R>
STATESCAN_INLINE const R* load_row(const Plane& x, int steps, R* scratch) {
  if (x.data == nullptr) return nullptr;
  load_tile(x, 1, steps, scratch, 1);
  clear_behind(scratch, steps);
  return scratch;
}

// Whether rows can be read and written where they are: whole vectors, all of one type.
template <class R>
STATESCAN_INLINE bool rows_in_place(int steps, std::initializer_list<Plane> rows) {
  if (steps % kLanes<R> != 0) return false;
  for (const Plane& x : rows) {
    if (x.data != nullptr && x.dtype != rows.begin()->dtype) return false;
  }
  return true;
}

// One channel in one piece of a sequence. Rows of whole vectors; `steps` of them count.
template <class R, class T>
struct Row {
  int steps;
  const T *u, *delta, *z;  // z may be null
  const R *B = nullptr, *C = nullptr;
  R A = 0, A_log2e = 0, D = 0, bias = 0;
  bool delta_softplus = false;
};

// Step sizes, 0 behind the last step. The slope of softplus too, if there is room for it.
template <class R, class T>
STATESCAN_INLINE void row_step_sizes(const Row<R, T>& x, R* delta, R* slope) {
  const Vec<R> bias = splat(x.bias);
  const int whole = whole_vectors(x.steps, kLanes<R>);
  for (int i = 0; i < whole; i += kLanes<R>) {
    Vec<R> d = load_convert<R>(x.delta + i) + bias, s = splat(R(1));
    if (x.delta_softplus) d = slope != nullptr ? softplus(d, s) : softplus(d);
    store(delta + i, d);
    if (slope != nullptr) store(slope + i, s);
  }
  for (int i = x.steps; i < whole; ++i) {
    delta[i] = 0;
    if (slope != nullptr) slope[i] = 0;
  }
}

// Calls f(i) for the first lane of each vector, in the order of the walk.
template <bool kBackwards, class R, class T, class F>
STATESCAN_INLINE void for_vectors(const Row<R, T>& x, F&& f) {
  const int whole = whole_vectors(x.steps, kLanes<R>);
  if constexpr (kBackwards) {
    for (int i = whole - kLanes<R>; i >= 0; i -= kLanes<R>) f(i);
  } else {
    for (int i = 0; i < whole; i += kLanes<R>) f(i);
  }
}

// y, gated; returns the last state. `delta` is scratch.
template <bool kReverse, class R, class T>
STATESCAN_INLINE R walk_row(const Row<R, T>& x, R h0, R* delta, T* y) {
  row_step_sizes(x, delta, static_cast<R*>(nullptr));
  Vec<R> h = splat(h0);
  const Vec<R> A = splat(x.A_log2e), D = splat(x.D);
  for_vectors<kReverse>(x, [&](int i) {
    const Vec<R> delta_i = load(delta + i), u = load_convert<R>(x.u + i);
    const Vec<R> states =
        next_states<R, kReverse>(decay(delta_i, A), delta_i * u * load(x.B + i), h);
    Vec<R> out = load(x.C + i) * states + D * u;
    if (x.z != nullptr) out *= silu(load_convert<R>(x.z + i));
    store_convert<R>(y + i, out);
  });
  return h[0];
}

// The gradients of one row.
template <class R, class T>
struct RowGrads {
  const T* dy;
  T *du, *ddelta, *dz;             // dz may be null
  R *dB = nullptr, *dC = nullptr;  // added to
  R dA = 0, dD = 0, dbias = 0;
};

// Room for whole vectors of a piece.
template <class R>
struct RowScratch {
  R *delta, *slope, *a, *h_prev, *dy;
};

// `dh` is the gradient of the last state and becomes that of h0.
template <bool kReverse, class R, class T>
STATESCAN_INLINE void walk_row_back(const Row<R, T>& x, R h0, R& dh, const RowScratch<R>& s,
                                    RowGrads<R, T>& grads) {
  row_step_sizes(x, s.delta, s.slope);
  const Vec<R> A = splat(x.A), A_log2e = splat(x.A_log2e), D = splat(x.D);
  Vec<R> h = splat(h0);
  for_vectors<kReverse>(x, [&](int i) {
    const Vec<R> delta = load(s.delta + i), u = load_convert<R>(x.u + i), before = h;
    const Vec<R> a = decay(delta, A_log2e);
    const Vec<R> states = next_states<R, kReverse>(a, delta * u * load(x.B + i), h);
    store(s.a + i, a);
    store(s.h_prev + i, shift_in<R, kReverse>(states, before));
    Vec<R> dy = load_convert<R>(grads.dy + i);
    if (x.z != nullptr) {
      const Vec<R> z = load_convert<R>(x.z + i), gate = sigmoid(z);
      const Vec<R> y = load(x.C + i) * states + D * u;
      store_convert<R>(grads.dz + i, dy * silu_slope(z, gate) * y);
      dy *= z * gate;
    }
    store(s.dy + i, dy);
  });
  // What step t hands to the step before it, k_t = a_t g_t, is a recurrence of the same form:
  // k_t = a_t k_{t+1} + a_t C_t dy_t
  Vec<R> k = splat(dh), dA{}, dD{}, dbias{};
  for_vectors<!kReverse>(x, [&](int i) {
    const Vec<R> a = load(s.a + i), h_prev = load(s.h_prev + i), dy = load(s.dy + i);
    const Vec<R> delta = load(s.delta + i), u = load_convert<R>(x.u + i), B = load(x.B + i);
    const Vec<R> C_dy = load(x.C + i) * dy, after = k;
    const Vec<R> handed = next_states<R, !kReverse>(a, a * C_dy, k);
    const Vec<R> g = C_dy + shift_in<R, !kReverse>(handed, after);
    const Vec<R> delta_u = delta * u, d_delta_u = g * B, d_log_a = handed * h_prev;
    const Vec<R> d_delta = (d_log_a * A + u * d_delta_u) * load(s.slope + i);
    store(grads.dC + i, load(grads.dC + i) + dy * next_state(a, h_prev, delta_u, B));
    store(grads.dB + i, load(grads.dB + i) + g * delta_u);
    store_convert<R>(grads.du + i, D * dy + delta * d_delta_u);
    store_convert<R>(grads.ddelta + i, d_delta);
    dA += d_log_a * delta;
    dD += dy * u;
    dbias += d_delta;
  });
  dh = k[0];
  grads.dA = sum_lanes_of<R>(dA);
  grads.dD = sum_lanes_of<R>(dD);
  grads.dbias = sum_lanes_of<R>(dbias);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::selective_scan
