// What the forward and the backward of the CPU selective scan along routes share: the operands of a
// block of channels on a piece of a route.
//
// Lanes are channels, time is serial. Tensors that live on the map (u, y and their gradients) are
// brought once into token tiles, [token][lane], which every route reads and adds to wherever it
// passes: no copy of them is made per route. A token tile has one row more than there are tokens:
// steps of no token read zeros from it and leave there what nobody wants.
#pragma once

#include "common/scratch.h"
#include "common/tile.h"
#include "common/vector_math.h"
#include "selective_scan/cpu_walk.h"
#include "selective_scan_2d/kernels.h"

namespace statescan::selective_scan_2d {
namespace STATESCAN_ISA {

using selective_scan::STATESCAN_ISA::for_state_blocks;
using selective_scan::STATESCAN_ISA::kLog2e;

// Elements from one row (state, or rank) of a narrow operand to the next. The numbers of a row are
// used one at a time, each by all lanes at once, so they stay in time order; the 16 beyond a chunk
// keep the rows from sharing one set of the first-level cache.
inline constexpr int kPitch = kMaxChunk + 16;

inline constexpr int kGhost = -1, kSkip = -2;

// The part of a tensor at one batch element and route: rows against tokens or steps.
STATESCAN_INLINE Plane plane(const View<4>& x, int64_t batch, int64_t route, int64_t row,
                             int64_t time) {
  return Plane{x.data, x.dtype, x.stride[2], x.stride[3]}.at(row, time).shifted(
      batch * x.stride[0] + route * x.stride[1]);
}

// A parameter of each channel, for the lanes [channel, channel + rows); `absent` where there is none.
template <class R>
STATESCAN_INLINE Vec<R> load_parameter(const View<2>& x, int64_t route, int64_t channel, int rows,
                                       R absent, int64_t repeat = 1) {
  Vec<R> v = splat(absent);
  if (!x) return v;
  for (int i = 0; i < rows; ++i) {
    v[i] =
        load_scalar<R>(x.dtype, x.data, route * x.stride[0] + (channel + i) / repeat * x.stride[1]);
  }
  return v;
}

template <class R>
STATESCAN_INLINE void clear(R* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = 0;
}

// Adds the zeros that steps of no token read.
template <class R>
STATESCAN_INLINE void load_tokens(const Plane& x, int rows, int64_t tokens, R* tile) {
  load_tile(x, rows, int(tokens), tile, kLanes<R>);
  clear(tile + tokens * kLanes<R>, kLanes<R>);
}

// Calls f(first, count) for pieces of the tokens.
template <class F>
STATESCAN_INLINE void for_token_pieces(int64_t tokens, F&& f) {
  for (int64_t first = 0; first < tokens; first += kMaxChunk) {
    f(first, int(tokens - first < kMaxChunk ? tokens - first : kMaxChunk));
  }
}

// The first step after `begin` at which a piece ends: a chunk does, or the state starts anew.
STATESCAN_INLINE int64_t piece_end(const Problem& p, int64_t begin) {
  int64_t end = (begin / p.chunk + 1) * p.chunk;
  if (p.reset_period > 0) {
    const int64_t reset = (begin / p.reset_period + 1) * p.reset_period;
    end = reset < end ? reset : end;
  }
  return end < p.steps ? end : p.steps;
}

// The step at which the piece that ends at `end` begins.
STATESCAN_INLINE int64_t piece_begin(const Problem& p, int64_t end) {
  const int64_t begin = (end - 1) / p.chunk * p.chunk;
  if (p.reset_period == 0) return begin;
  const int64_t reset = (end - 1) / p.reset_period * p.reset_period;
  return reset > begin ? reset : begin;
}

// The operands of a block of channels on a route, and on a piece of it.
template <class R>
class Operands {
 public:
  Operands(const Problem& p, Scratch& scratch) : p_(p) {
    A = scratch.take<R>(p.state * kLanes<R>);
    A_log2e = scratch.take<R>(p.state * kLanes<R>);
    dt_weight = scratch.take<R>(p.rank * kLanes<R>);
    B = scratch.take<R>(p.state * kPitch);
    C = scratch.take<R>(p.state * kPitch);
    dt = scratch.take<R>(p.rank * kPitch);
    delta = scratch.take<R>((kMaxChunk + kLanes<R>)*kLanes<R>);  // room to work in whole blocks
    slope = scratch.take<R>((kMaxChunk + kLanes<R>)*kLanes<R>);
  }

  R *A, *A_log2e, *dt_weight;  // (state, lane), (state, lane), (rank, lane)
  Vec<R> D, bias, weight;
  R *B, *C, *dt;          // (state, kPitch), (state, kPitch), (rank, kPitch)
  R *delta, *slope;       // (step, lane): the step size, and its derivative
  int32_t at[kMaxChunk];  // where in a token tile a step reads and writes
  bool special;           // there are steps of no token

  void begin_route(int64_t route, int64_t channel, int rows) {
    table(p_.A, route, channel, rows, p_.state, A);
    for (int64_t i = 0; i < p_.state * kLanes<R>; ++i) A_log2e[i] = A[i] * R(kLog2e);
    if (p_.rank > 0) table(p_.dt_weight, route, channel, rows, p_.rank, dt_weight);
    D = load_parameter<R>(p_.D, route, channel, rows, 0);
    bias = load_parameter<R>(p_.delta_bias, route, channel, rows, 0, p_.delta_repeat);
    weight = load_parameter<R>(p_.weights, route, channel, rows, 1);
  }

  // Asks for the narrow operands of the piece after this one: every block of channels reads them all
  // again, and by then they have left the second-level cache.
  void prefetch(int64_t batch, int64_t route, int64_t begin, int steps) {
    prefetch_tile(plane(p_.B, batch, route, 0, begin), int(p_.state), steps);
    prefetch_tile(plane(p_.C, batch, route, 0, begin), int(p_.state), steps);
    if (p_.rank > 0) prefetch_tile(plane(p_.delta, batch, route, 0, begin), int(p_.rank), steps);
  }

  // kSlope: the derivative of the step sizes is wanted, too.
  template <bool kSlope>
  void begin_piece(int64_t batch, int64_t route, int64_t begin, int steps, int64_t channel,
                   int rows) {
    narrow(p_.B, batch, route, begin, steps, p_.state, B);
    narrow(p_.C, batch, route, begin, steps, p_.state, C);
    if (p_.rank > 0) {
      narrow(p_.delta, batch, route, begin, steps, p_.rank, dt);
    } else {
      load_tile(plane(p_.delta, batch, route, 0, begin), rows, steps, delta, kLanes<R>,
                p_.delta_repeat, channel);
    }
    step_sizes<kSlope>(steps);
    find_tokens(batch, route, begin, steps);
    if (special) leave_out<kSlope>(steps);
  }

 private:
  static constexpr int kUnroll = 4;

  // to[i * kLanes + lane] = x[route, channel + lane, i]
  void table(const View<3>& x, int64_t route, int64_t channel, int rows, int64_t count, R* to) {
    const Plane from = Plane{x.data, x.dtype, x.stride[1], x.stride[2]}.at(channel, 0);
    load_tile(from.shifted(route * x.stride[0]), rows, int(count), to, kLanes<R>);
  }

  // to[row * kPitch + i] = x[batch, route, row, begin + i]
  void narrow(const View<4>& x, int64_t batch, int64_t route, int64_t begin, int steps,
              int64_t count, R* to) {
    Plane from = plane(x, batch, route, 0, begin);
    if (from.time_stride == 1) {
      for (int64_t row = 0; row < count; ++row) {
        load_tile(from.at(row, 0), 1, steps, to + row * kPitch, 1);
      }
      return;
    }
    const int64_t row_stride = from.row_stride;  // tile.h's rows are the steps here
    from.row_stride = from.time_stride;
    from.time_stride = row_stride;
    load_tile(from, steps, int(count), to, kPitch);
  }

  template <bool kSlope>
  void step_sizes(int steps) {
    if (p_.delta_softplus) return step_sizes<kSlope, true>(steps);
    step_sizes<kSlope, false>(steps);
  }

  template <bool kSlope, bool kSoftplus>
  void step_sizes(int steps) {
    // Local copies: a store of floats might change the members, for all the compiler knows.
    R *out = delta, *out_slope = slope;
    const R *weights = dt_weight, *narrow = dt;
    const Vec<R> b = bias;
    const int64_t rank = p_.rank;
    for (int i = 0; i < steps; i += kUnroll) {
      Vec<R> x[kUnroll], s[kUnroll];
#pragma GCC unroll 4
      for (int j = 0; j < kUnroll; ++j) {
        x[j] = rank > 0 ? b : b + load(out + (i + j) * kLanes<R>);
        s[j] = splat(R(1));
      }
      for (int64_t r = 0; r < rank; ++r) {
        const Vec<R> w = load(weights + r * kLanes<R>);
#pragma GCC unroll 4
        for (int j = 0; j < kUnroll; ++j) x[j] += w * narrow[r * kPitch + i + j];
      }
#pragma GCC unroll 4
      for (int j = 0; j < kUnroll; ++j) {
        if constexpr (kSoftplus && kSlope) {
          x[j] = softplus(x[j], s[j]);
        } else if constexpr (kSoftplus) {
          x[j] = softplus(x[j]);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kUnroll; ++j) {
        store(out + (i + j) * kLanes<R>, x[j]);
        if constexpr (kSlope) store(out_slope + (i + j) * kLanes<R>, s[j]);
      }
    }
  }

  void find_tokens(int64_t batch, int64_t route, int64_t begin, int steps) {
    const int64_t first =
        batch * p_.index_stride[0] + route * p_.index_stride[1] + begin * p_.index_stride[2];
    if (p_.index_is_wide) {
      copy_tokens(static_cast<const int64_t*>(p_.index) + first, steps);
    } else {
      copy_tokens(static_cast<const int32_t*>(p_.index) + first, steps);
    }
    const int32_t none = int32_t(p_.tokens);
    int32_t least = 0;
    for (int i = 0; i < steps; ++i) {
      const int32_t token = token_[i];
      least = token < least ? token : least;
      at[i] = (token < 0 ? none : token) * kLanes<R>;
    }
    special = least < 0;
  }

  template <class T>
  STATESCAN_INLINE void copy_tokens(const T* from, int steps) {
    const int64_t stride = p_.index_stride[2];
    if (stride == 1) {
      for (int i = 0; i < steps; ++i) token_[i] = int32_t(from[i]);
      return;
    }
    for (int i = 0; i < steps; ++i) token_[i] = int32_t(from[i * stride]);
  }

  // A step of no token has no part in B and C, whatever they hold; one to skip takes no time.
  template <bool kSlope>
  void leave_out(int steps) {
    for (int i = 0; i < steps; ++i) {
      if (token_[i] >= 0) continue;
      for (int64_t n = 0; n < p_.state; ++n) B[n * kPitch + i] = C[n * kPitch + i] = 0;
      if (token_[i] != kSkip) continue;
      store(delta + i * kLanes<R>, Vec<R>{});
      if constexpr (kSlope) store(slope + i * kLanes<R>, Vec<R>{});
      for (int64_t r = 0; r < p_.rank; ++r) dt[r * kPitch + i] = 0;
    }
  }

  const Problem& p_;
  int32_t token_[kMaxChunk];
};

}  // namespace STATESCAN_ISA
}  // namespace statescan::selective_scan_2d
