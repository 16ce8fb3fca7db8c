// What the forward and the backward of the CPU selective scan share: how a task walks its rows, and
// the operands of one piece of a sequence.
//
// Lanes are channels, time is serial, and the states of a block of lanes stay in registers, sixteen
// at a time. A piece is the part of a segment that lies in one chunk; its operands are brought into
// tiles (common/tile.h), which stay in the first-level cache.
#pragma once

#include "common/scratch.h"
#include "common/tile.h"
#include "common/vector_math.h"
#include "selective_scan/equations.h"
#include "selective_scan/kernels.h"

namespace statescan::selective_scan {
namespace STATESCAN_ISA {

inline constexpr double kLog2e = 1.4426950408889634;

// The channels of one task.
struct Channels {
  int64_t group, begin, end;
  int64_t part;  // which task of the group this is
};

STATESCAN_INLINE Channels task_channels(const Problem& p, int64_t channel_task) {
  const int64_t group = channel_task / p.tasks_per_group(),
                part = channel_task % p.tasks_per_group();
  const int64_t begin = group * p.group_dim() + part * p.task_channels();
  const int64_t group_end = (group + 1) * p.group_dim();
  const int64_t end = begin + p.task_channels();
  return {group, begin, end < group_end ? end : group_end, part};
}

// Steps [begin, end) of a segment within chunk `chunk`. `entry`: the walk enters the chunk here, so
// the state before this piece is the one saved for the chunk.
struct Piece {
  int64_t begin, end, chunk;
  bool entry;

  int steps() const { return int(end - begin); }
};

STATESCAN_INLINE int64_t piece_count(const Problem& p, const Segment& s) {
  return s.begin == s.end ? 0 : (s.end - 1) / p.chunk - s.begin / p.chunk + 1;
}

// The i-th piece of a segment in the order of the scan.
STATESCAN_INLINE Piece piece_at(const Problem& p, const Segment& s, int64_t i) {
  const int64_t chunk = p.reverse ? (s.end - 1) / p.chunk - i : s.begin / p.chunk + i;
  const int64_t chunk_begin = chunk * p.chunk;
  int64_t chunk_end = chunk_begin + p.chunk;
  if (chunk_end > p.seqlen) chunk_end = p.seqlen;
  Piece piece{chunk_begin > s.begin ? chunk_begin : s.begin, chunk_end < s.end ? chunk_end : s.end,
              chunk, false};
  piece.entry = p.reverse ? piece.end == chunk_end : piece.begin == chunk_begin;
  return piece;
}

// The rows n of B or C at one batch element and group, from `time` on.
STATESCAN_INLINE Plane plane(const View<4>& x, int64_t batch, int64_t group, int64_t time) {
  return Plane{x.data, x.dtype, x.stride[2], x.stride[3]}.at(0, time).shifted(batch * x.stride[0] +
                                                                              group * x.stride[1]);
}

// The part of a tensor that the block of channels after this one, `block` of them, will read or
// write: of this piece, or of the next one in the direction of the walk, `step` = +1 or -1.
template <bool kWrite = false>
STATESCAN_INLINE void prefetch_next(const Problem& p, const View<3>& x, const Channels& c,
                                    int64_t batch, const Piece& piece, int64_t channel, int block,
                                    int step) {
  int64_t time = piece.begin;
  channel += block;
  if (channel >= c.end) {
    channel = c.begin;
    time += step * p.chunk;
    if (time < 0 || time >= p.seqlen) return;
  }
  const int64_t steps = p.seqlen - time, rows = c.end - channel;
  prefetch_tile<kWrite>(plane(x, batch, channel, time), int(rows < block ? rows : block),
                        int(steps < p.chunk ? steps : p.chunk));
}

// A per-channel parameter for the lanes [channel, channel + rows); `absent` where there is none.
template <class R>
STATESCAN_INLINE Vec<R> load_parameter(const View<1>& x, int64_t channel, int rows, R absent,
                                       int64_t repeat = 1) {
  Vec<R> v = splat(absent);
  if (!x) return v;
  for (int i = 0; i < rows; ++i) {
    v[i] = load_scalar<R>(x.dtype, x.data, (channel + i) / repeat * x.stride[0]);
  }
  return v;
}

// table[n * kLanes + lane] = x[channel + lane, n], a table of (channel, state) numbers.
template <class R>
STATESCAN_INLINE void load_table(const View<4>& x, int64_t channel, int rows, int64_t state,
                                 R scale, R* table) {
  const Plane from = Plane{x.data, x.dtype, x.stride[1], x.stride[2]}.at(channel, 0);
  load_tile(from, rows, int(state), table, kLanes<R>);
  for (int64_t i = 0; i < state * kLanes<R>; ++i) table[i] *= scale;
}

// B or C of state n: one number for all lanes, or where it is constant in time, one for each.
template <class R, bool kConstant>
STATESCAN_INLINE auto coefficient(const R* x, int n) {
  if constexpr (kConstant) {
    return load(x + n * kLanes<R>);
  } else {
    return x[n];
  }
}

// Calls f(first channel, channels in the block, where its states lie in a table of the task) for
// every block of lanes of a task.
template <class R, class F>
STATESCAN_INLINE void for_channel_blocks(const Problem& p, const Channels& c, F&& f) {
  for (int64_t channel = c.begin; channel < c.end; channel += kLanes<R>) {
    const int64_t left = c.end - channel;
    f(channel, left < kLanes<R> ? int(left) : kLanes<R>, (channel - c.begin) * p.state);
  }
}

// Calls f(block size tag, n) for n = 0 .. state, in blocks of 16, then 8, 4, 2, 1.
template <int kBlock, class F>
STATESCAN_INLINE void for_state_blocks(int64_t begin, int64_t state, F&& f) {
  while (begin + kBlock <= state) {
    f(std::integral_constant<int, kBlock>{}, begin);
    begin += kBlock;
  }
  if constexpr (kBlock > 1) for_state_blocks<kBlock / 2>(begin, state, f);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::selective_scan
