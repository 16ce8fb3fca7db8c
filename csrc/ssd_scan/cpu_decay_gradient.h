// The backward's share of step sizes and decays, and the products that bring it about.
#pragma once

#include "ssd_scan/cpu_walk.h"

namespace statescan::ssd_scan {
namespace STATESCAN_ISA {

template <class R>
STATESCAN_INLINE R dot(const R* a, const R* b, int64_t count) {
  Vec<R> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<R> <= count; i += 4 * kLanes<R>) {
    for (int j = 0; j < 4; ++j) {
      sums[j] += load(a + i + j * kLanes<R>) * load(b + i + j * kLanes<R>);
    }
  }
  for (; i < count; i += kLanes<R>) sums[0] += load(a + i) * load(b + i);
  return sum_lanes_of<R>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// One block of `project`, of which the first `rows` rows count.
template <class R, int kM, int kN>
STATESCAN_INLINE void add_projection(const Block<R, kM, kN>& Q, int rows, const R* partner,
                                     const R* scale, const R* weight, R* sums, R* products) {
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) {
    const int at = j * kLanes<R>;
    const Vec<R> by = load(scale + at), shared = weight == nullptr ? by : by * load(weight + at);
    Vec<R> product{};
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      if (i < rows) {
        product += load(partner + i * kPitch + at) * Q.at[i][j];
        store(sums + i * kPitch + at, load(sums + i * kPitch + at) + shared * Q.at[i][j]);
      }
    }
    store(products + at, load(products + at) + by * product);
  }
}

// With Q[n, t] = scale[t] <state[n], vectors[t]>: sums[n, t] += weight[t] Q[n, t] and products[t]
// += sum over n of partner[n, t] Q[n, t]. The state is (state, headdim), all others have steps as
// their columns.
template <class R, class E>
void project(const Problem& p, int steps, const E* state, const E* vectors, const R* partner,
             const R* scale, const R* weight, R* sums, R* products) {
  const int state_row = padded<R>(p.headdim) / kDepth<E>, N = int(p.state);
  for_blocks(N, padded<R>(steps) / kLanes<R>, [&](auto M, auto V, int n, int v) {
    const int t = v * kLanes<R>;
    Block<R, M(), V()> Q;
    multiply(Q, state + n * state_row, state_row, 1, vectors + t, kPitch,
             (int(p.headdim) + kDepth<E> - 1) / kDepth<E>);
    add_projection(Q, N - n, partner + n * kPitch + t, scale + t,
                   weight == nullptr ? nullptr : weight + t, sums + n * kPitch + t, products + t);
  });
}

// The gradients of the weights and decays of one head within a piece.
template <class R>
class DecayGradient {
 public:
  DecayGradient(const Problem& p, Scratch& scratch) : shift_(p.shift_output ? 1 : 0) {
    constexpr int64_t kNumbers = kTile + 2 * 16;
    for (R** x : {&slope, &from_output, &into_state, &index_, &through_, &d_weight_, &d_decay_}) {
      *x = scratch.take<R>(kNumbers);
    }
    for (R** x : {&sums_, &crossing_}) *x = scratch.take<R>((kTile + kLanes<R>)*kLanes<R>);
    for (int i = 0; i < kTile; ++i) index_[i] = R(i);
  }

  void begin(int steps) {
    clear(from_output, padded<R>(steps));
    clear(into_state, padded<R>(steps));
  }

  // GL = G L, and dG += V L w, from V and G (step s, step t). What the weights get through the
  // outputs of the piece; and for each step s what crosses from it to the next one, the sum over t
  // > s and s' <= s of V GL w.
  void through_steps(const Decays<R>& decays, int steps, const R* V, const R* G, R* GL, R* dG) {
    const int wide = padded<R>(steps);
    clear(through_, wide);
    for (int s = 0; s < steps; ++s) {
      const R weight = decays.weight[s];
      Vec<R> sum{}, crossing{};
      for (int t = s / kMaxRows * kMaxRows; t < wide; t += kLanes<R>) {
        const int at = s * kPitch + t;
        const Vec<R> index = load(index_ + t), zero{};
        const auto from_s = index >= R(s + shift_), after_s = index >= R(s + shift_ + 1);
        const Vec<R> L = from_s ? decays.between_rows(t, s) : zero;
        const Vec<R> here = from_s ? load(V + at) : zero, mixed = from_s ? load(G + at) * L : zero;
        store(GL + at, mixed);
        store(dG + at, load(dG + at) + here * L * weight);
        const Vec<R> share = here * mixed, through = load(through_ + t) + share * weight;
        store(through_ + t, through);
        sum += share;
        crossing += after_s ? through : zero;
      }
      store(sums_ + s * kLanes<R>, sum);
      store(crossing_ + s * kLanes<R>, crossing);
    }
    for (int s = 0; s < steps; s += kLanes<R>) {
      Vec<R> held[kLanes<R>];
      for (int i = 0; i < kLanes<R>; ++i) held[i] = load(sums_ + (s + i) * kLanes<R>);
      store(d_weight_ + s, sum_lanes<R>(held));
      for (int i = 0; i < kLanes<R>; ++i) held[i] = load(crossing_ + (s + i) * kLanes<R>);
      store(through_ + s, sum_lanes<R>(held));
    }
  }

  // The gradient of dt as given, or of the logarithm of the decay; dA and dbias are added to.
  //
  // The logarithm of step r's decay is in every term that goes from before r to r or after it: from
  // step to step (through_), from the state before the piece to an output (from_output), from a
  // step into the state after the piece (into_state), and from one state to the other (held). All
  // are sums of such terms alone: nothing is added that has to cancel.
  const R* finish(const Problem& p, const Decays<R>& decays, int steps, R A, R held, R& dA,
                  R& dbias) {
    R sum = 0;  // over the outputs from r on
    for (int r = steps - 1; r >= 0; --r) {
      if (r + shift_ < steps) sum += from_output[r + shift_];
      d_decay_[r] = sum;
    }
    sum = held;  // and over the steps before r
    for (int r = 0; r < steps; ++r) {
      d_decay_[r] += r == 0 ? sum : sum + through_[r - 1];
      sum += decays.weight[r] * into_state[r];
    }
    if (!p.has_dt) return d_decay_;
    R dA_here = 0, dbias_here = 0;
    for (int r = 0; r < steps; ++r) {
      const R ddt = (d_weight_[r] + into_state[r] + d_decay_[r] * A) * slope[r];
      dA_here += d_decay_[r] * decays.weight[r];
      dbias_here += ddt;
      d_decay_[r] = ddt;
    }
    dA += dA_here;
    dbias += dbias_here;
    return d_decay_;
  }

  R* slope;        // (step) of the step size
  R* from_output;  // (step) <row[t] C[t] S, dy[t]>
  R* into_state;   // (step) <column[s] B[s] dS, x[s]>

 private:
  int shift_;                                   // 1: the output of row t is that of step t - 1
  R *index_, *through_, *d_weight_, *d_decay_;  // (step)
  R *sums_, *crossing_;                         // (step, lane)
};

}  // namespace STATESCAN_ISA
}  // namespace statescan::ssd_scan
