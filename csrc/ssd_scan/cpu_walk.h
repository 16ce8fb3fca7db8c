// What the forward and the backward of the CPU SSD scan share: how a task walks its rows, and the
// operands of one piece of a sequence.
//
// A piece is the part of a segment that lies in one cell, at most kTile steps. Its tiles hold the
// steps in the order of the scan: a reversed scan differs only in how tiles are read and written.
#pragma once

#include "common/matmul.h"
#include "common/scratch.h"
#include "common/tile.h"
#include "common/vector_math.h"
#include "ssd_scan/equations.h"
#include "ssd_scan/kernels.h"

namespace statescan::ssd_scan {
namespace STATESCAN_ISA {

inline constexpr int kPitch = int(kTile);  // of tiles whose columns are steps

// The heads of one task.
struct Heads {
  int64_t group, begin, end;
  int64_t part;  // which task of the group this is

  int count() const { return int(end - begin); }
};

STATESCAN_INLINE Heads task_heads(const Problem& p, int64_t head_task) {
  const int64_t group = head_task / p.tasks_per_group(), part = head_task % p.tasks_per_group();
  const int64_t begin = group * p.group_heads() + part * p.heads_per_task;
  const int64_t group_end = (group + 1) * p.group_heads(), end = begin + p.heads_per_task;
  return {group, begin, end < group_end ? end : group_end, part};
}

// Steps [begin, end) of a segment within one cell of a chunk.
struct Piece {
  int64_t begin, end, chunk, cell;
  bool first, last;  // of its segment, in the order of the scan
  bool entry;        // the walk enters the cell here
  bool chunk_entry;  // and the chunk

  int steps() const { return int(end - begin); }
};

STATESCAN_INLINE int64_t cell_at(const Problem& p, int64_t t) {
  return t / p.chunk * p.cells_per_chunk() + t % p.chunk / p.cell();
}

STATESCAN_INLINE int64_t piece_count(const Problem& p, const Segment& s) {
  return s.begin == s.end ? 0 : cell_at(p, s.end - 1) - cell_at(p, s.begin) + 1;
}

// The i-th piece of a segment in the order of the scan.
STATESCAN_INLINE Piece piece_at(const Problem& p, const Segment& s, int64_t i) {
  const int64_t cell = p.reverse ? cell_at(p, s.end - 1) - i : cell_at(p, s.begin) + i;
  const int64_t chunk = cell / p.cells_per_chunk(), chunk_begin = chunk * p.chunk;
  const int64_t chunk_end = chunk_begin + p.chunk < p.seqlen ? chunk_begin + p.chunk : p.seqlen;
  const int64_t cell_begin = chunk_begin + cell % p.cells_per_chunk() * p.cell();
  const int64_t cell_end = cell_begin + p.cell() < chunk_end ? cell_begin + p.cell() : chunk_end;
  Piece piece{cell_begin > s.begin ? cell_begin : s.begin,
              cell_end < s.end ? cell_end : s.end,
              chunk,
              cell,
              i == 0,
              false,
              false,
              false};
  piece.last = p.reverse ? piece.begin == s.begin : piece.end == s.end;
  piece.entry = p.reverse ? piece.end == cell_end : piece.begin == cell_begin;
  piece.chunk_entry = p.reverse ? piece.end == chunk_end : piece.begin == chunk_begin;
  return piece;
}

// Whole vectors, in numbers.
template <class R>
STATESCAN_INLINE int padded(int64_t count) {
  return int((count + kLanes<R> - 1) / kLanes<R>) * kLanes<R>;
}

// A tensor (batch, seqlen, head or group, ...) from the step that the scan walks first in the
// piece, `steps_before` steps earlier in its order, with steps as time and the last dimension as
// rows.
STATESCAN_INLINE Plane scan_plane(const Problem& p, const View<4>& x, int64_t batch, int64_t head,
                                  const Piece& piece, int steps_before = 0) {
  const int64_t step = p.reverse ? -1 : 1;
  const int64_t t = (p.reverse ? piece.end - 1 : piece.begin) - step * steps_before;
  return Plane{x.data, x.dtype, x.stride[3], step * x.stride[1]}.shifted(
      batch * x.stride[0] + t * x.stride[1] + head * x.stride[2]);
}

STATESCAN_INLINE Plane scan_plane(const Problem& p, const View<3>& x, int64_t batch, int64_t head,
                                  const Piece& piece) {
  const View<4> tokens{x.data, x.dtype, {x.stride[0], x.stride[1], x.stride[2], 0}};
  return scan_plane(p, tokens, batch, head, piece);
}

// Steps as rows, so that a tile has them in its lanes.
STATESCAN_INLINE Plane flipped(const Plane& x) {
  return {x.data, x.dtype, x.time_stride, x.row_stride};
}

// The state (headdim, state) of a slot and a head, as tile[n][p].
STATESCAN_INLINE Plane state_plane(const View<4>& x, int64_t slot, int64_t head) {
  return Plane{x.data, x.dtype, x.stride[2], x.stride[3]}.shifted(slot * x.stride[0] +
                                                                  head * x.stride[1]);
}

STATESCAN_INLINE Plane state_plane(const View<5>& x, int64_t batch, int64_t chunk, int64_t head) {
  return Plane{x.data, x.dtype, x.stride[3], x.stride[4]}.shifted(
      batch * x.stride[0] + chunk * x.stride[1] + head * x.stride[2]);
}

// The piece after this one in the order of the scan, or before it (step = -1), if its segment has
// one and as if it were as long: to ask for its cache lines.
STATESCAN_INLINE Piece neighbour(const Problem& p, const Piece& piece, int step) {
  Piece next = piece;
  const int64_t by = (p.reverse ? -step : step) * int64_t(piece.steps());
  if (step > 0 ? piece.last : piece.first) return piece;
  next.begin += by, next.end += by;
  if (next.begin < 0 || next.end > p.seqlen) return piece;
  return next;
}

template <class R>
STATESCAN_INLINE void clear(R* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = 0;
}

template <class R>
STATESCAN_INLINE R load_or(const View<1>& x, int64_t i, R absent) {
  return x ? load_scalar<R>(x.dtype, x.data, i * x.stride[0]) : absent;
}

// B or C of a piece as tile[t][n], rows beyond the last one clear up to a block's. With `shift`,
// row t holds step t - 1; before the first step of a segment there is none, and its row is 0.
template <class R>
STATESCAN_INLINE void load_projection(const Problem& p, const View<4>& x, int64_t batch,
                                      int64_t group, const Piece& piece, bool shift, R* tile) {
  const int pitch = padded<R>(p.state), steps = piece.steps();
  const int skip = shift && piece.first ? 1 : 0;
  clear(tile, skip * pitch);
  load_tile(scan_plane(p, x, batch, group, piece, shift ? 1 : 0).at(0, skip), int(p.state),
            steps - skip, tile + skip * pitch, pitch);
  clear(tile + steps * pitch, kMaxRows * pitch);
}

// tile[column][row] of tile[row][column].
template <class R>
STATESCAN_INLINE void transpose_tile(const R* from, int pitch, int rows, int columns, R* to,
                                     int to_pitch) {
  constexpr DType type = std::is_same_v<R, double> ? DType::kFloat64 : DType::kFloat32;
  load_tile(Plane{const_cast<R*>(from), type, pitch, 1}, rows, columns, to, to_pitch);
}

// D of a task's heads as rows of headdim numbers; 0 where there is none.
template <class R>
STATESCAN_INLINE void load_D(const Problem& p, const View<2>& D, const Heads& heads, R* rows) {
  const int pitch = padded<R>(p.headdim);
  clear(rows, heads.count() * pitch);
  if (!D) return;
  for (int64_t h = heads.begin; h < heads.end; ++h) {
    for (int64_t i = 0; i < p.headdim; ++i) {
      rows[(h - heads.begin) * pitch + i] =
          load_scalar<R>(D.dtype, D.data, h * D.stride[0] + i * D.stride[1]);
    }
  }
}

// The decays of one head within a piece. With a_t the sum of the logarithms up to and with step t,
// kept in base 2 and in two parts, since a small difference of two large sums must still be exact:
//
//   between(t, s) = exp(a_t' - a_s)   of what step s puts into the state, at the output of row t
//   row[t] = exp(a_t')                of the state before the piece, at the output of row t
//   column[s] = exp(a_last - a_s)     of what step s puts into the state, at the end of the piece
//   whole = exp(a_last)               of the state before the piece, at its end
//
// where t' is t, or t - 1 if the output is shifted.
template <class R>
class Decays {
 public:
  static constexpr int64_t kScratch = 5 * (kTile + 2 * 16);

  Decays(const Problem& p, Scratch& scratch) : shift_(p.shift_output ? 1 : 0) {
    for (R** x : {&weight, &row, &column, &high_, &low_}) *x = scratch.take<R>(kTile + 2 * 16);
  }

  // dt (step) as it is given becomes `weight`; slope, if wanted, its derivative.
  void find(const Problem& p, R A, R bias, int steps, R* slope) {
    const R low = R(p.dt_min), high = R(p.dt_max);
    if (p.has_dt) {
      for (int t = 0; t < steps; t += kLanes<R>) {
        const Vec<R> dt = load(weight + t);
        if (slope == nullptr) {
          store(weight + t, step_size(dt, bias, p.dt_softplus, low, high));
        } else {
          Vec<R> d;
          store(weight + t, step_size(dt, bias, p.dt_softplus, low, high, d));
          store(slope + t, d);
        }
      }
    }
    high_[0] = low_[0] = 0;
    double sum = 0;
    const double scale = p.has_dt ? double(A) * kLog2e : kLog2e;
    for (int t = 0; t < steps; ++t) {
      double log2 = double(weight[t]) * scale;
      log2 = log2 < -kLog2Bound ? -kLog2Bound : log2 > kLog2Bound ? kLog2Bound : log2;
      sum += log2;
      high_[t + 1] = R(sum);
      low_[t + 1] = R(sum - double(high_[t + 1]));
    }
    const int whole_vectors = padded<R>(steps);
    for (int t = steps; t < whole_vectors; ++t) {  // lanes beyond the last step: finite, no weight
      high_[t + 1] = high_[steps];
      low_[t + 1] = low_[steps];
    }
    const Vec<R> last_high = splat(high_[steps]), last_low = splat(low_[steps]);
    const R *row_high = high_ + 1 - shift_, *row_low = low_ + 1 - shift_;
    for (int t = 0; t < steps; t += kLanes<R>) {
      if (!p.has_dt) store(weight + t, 1 - Vec<R>{});
      store(row + t, exp2(load(row_high + t) + load(row_low + t)));
      const Vec<R> left = (last_high - load(high_ + 1 + t)) + (last_low - load(low_ + 1 + t));
      store(column + t, exp2(left));
    }
    for (int t = steps; t < whole_vectors; ++t) weight[t] = 0;
    whole = exp2(last_high + last_low)[0];
  }

  // For the lanes s .. of row t, and for the lanes t .. of column s.
  STATESCAN_INLINE Vec<R> between(int t, int s) const {
    const int r = t + 1 - shift_;
    return exp2((high_[r] - load(high_ + 1 + s)) + (low_[r] - load(low_ + 1 + s)));
  }
  STATESCAN_INLINE Vec<R> between_rows(int t, int s) const {
    const int r = t + 1 - shift_;
    return exp2((load(high_ + r) - high_[s + 1]) + (load(low_ + r) - low_[s + 1]));
  }

  R *weight, *row, *column;  // (step), with room for a vector and a block beyond the last
  R whole;

 private:
  int shift_;       // 1: the output of row t is that of step t - 1
  R *high_, *low_;  // (1 + step), the first 0
};

}  // namespace STATESCAN_ISA
}  // namespace statescan::ssd_scan
