// Parameters and entry points of the short convolution's CPU kernels.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "causal_conv1d/shape.h"
#include "common/host_device.h"
#include "common/isa.h"
#include "common/segments.h"
#include "common/view.h"

namespace statescan::causal_conv1d {

// How the operands lie in memory, which decides what the lanes of a vector are.
enum class Layout : int8_t {
  kChannelLast,   // stride 1 along channels: lanes are channels, read and written in place
  kChannelFirst,  // stride 1 along time: lanes are time steps, read and written in place
  kStrided,       // anything else: lanes are channels, through tiles
};

inline constexpr int64_t kUnit = 16;      // channels: the lanes of the widest vector
inline constexpr int64_t kFastWidth = 8;  // wider filters go through tiles, with a loop over taps

// Positions [begin, end) of a segment; forward: outputs, backward: of the padded sequence.
struct Piece {
  int64_t segment, begin, end;
};

// A task of a kernel is a piece (or a group of pieces) times a block of channels. Tasks follow from
// the shape alone, never from the number of threads or the instruction set, and so does the order
// of every sum over tasks.
struct Problem : Shape {
  Layout layout;
  const Segments* segments;
  const std::vector<Piece>* pieces;
  int64_t block_units;  // channels of a task, in units
  const void* filter;   // (width + 1, filter_pitch): taps in order of time, then bias; compute type

  // Whole vectors may be read from any channel on.
  STATESCAN_HOST_DEVICE int64_t filter_pitch() const {
    return (dim + kUnit - 1) / kUnit * kUnit + kUnit;
  }
  STATESCAN_HOST_DEVICE int64_t blocks() const {
    const int64_t units = dim / kUnit;
    return units > 0 ? (units + block_units - 1) / block_units : dim > 0;
  }
  // Where block i begins. The last one takes the channels beyond the last whole unit too.
  STATESCAN_HOST_DEVICE int64_t block_begin(int64_t i) const {
    return i == blocks() ? dim : dim / kUnit * i / blocks() * kUnit;
  }
};

struct FilterParams {
  int64_t dim, width, pitch;
  bool mirror;
  DType compute;
  View<2> weight;  // (dim, width)
  View<1> bias;    // (dim), or absent
  void* filter;    // see Problem
};

struct FwdParams : Problem {
  View<3> x;              // (batch, dim, seqlen)
  View<3> initial_state;  // (slot, dim, width - 1), or absent: zero
  View<3> y;              // (batch, dim, seqlen)
  View<3> final_state;    // (slot, dim, width - 1), or absent

  void plan();  // fills block_units
  int64_t piece_steps() const;
  int64_t tasks() const { return int64_t(pieces->size()) * blocks(); }
  int64_t grain() const;
  int64_t scratch_bytes() const;
};

struct BwdParams : Problem {
  View<3> x;              // (batch, dim, seqlen)
  View<3> initial_state;  // (slot, dim, width - 1), or absent: zero
  View<3> dy;             // (batch, dim, seqlen), or absent: zero
  View<3> dfinal_state;   // (slot, dim, width - 1), or absent: zero

  View<3> dx;              // (batch, dim, seqlen)
  View<3> dinitial_state;  // (slot, dim, width - 1), or absent
  void* dfilter;           // (piece group, width + 1, dim): partial sums in the compute type

  void plan();
  int64_t piece_steps() const;
  // Neighbouring pieces share a partial sum, which bounds their number.
  int64_t groups() const {
    const int64_t count = int64_t(pieces->size());
    return count < 16 ? count : 16;
  }
  int64_t tasks() const { return groups() * blocks(); }
  int64_t grain() const;
  int64_t scratch_bytes() const;
};

// A task is a block of channels of a few batch elements.
struct UpdateParams : UpdateShape {
  View<3> x;                 // (batch, dim, tokens)
  View<3> state;             // (slot, dim, state_len)
  View<2> weight;            // (dim, width)
  View<1> bias;              // (dim), or absent
  View<3> y;                 // (batch, dim, tokens)
  const int64_t* slot_of;    // (batch), negative: skip; or null: element b has slot b
  const int64_t* positions;  // (batch), where the first token goes in a circular state; or null

  static constexpr int64_t kChannels = 256, kElements = 8;  // of a task
  int64_t blocks() const { return (dim + kChannels - 1) / kChannels; }
  int64_t tasks() const { return blocks() * ((batch + kElements - 1) / kElements); }
  int64_t grain() const;
  int64_t scratch_bytes() const;
};

// The last state_len inputs of each segment, zeros before them where there are fewer.
struct VarlenStatesParams {
  int64_t dim, state_len;
  DType compute;
  const std::vector<Segment>* segments;
  View<3> x;       // (1, dim, total)
  View<3> states;  // (segment, dim, state_len)

  int64_t blocks() const { return (dim + 63) / 64; }
  int64_t tasks() const { return blocks() * int64_t(segments->size()); }
  int64_t scratch_bytes() const { return 64 * 64 * element_bytes(compute) + 64; }
};

// The layout of operands of (batch, dim, seqlen), all of which must have it.
Layout layout_of(const Problem& p, std::initializer_list<const View<3>*> operands);

// Every segment in pieces of `steps`; an empty segment is one empty piece. `padded`: counted in the
// padded sequence, the last piece taking all of its end.
std::vector<Piece> cut(const Problem& p, int64_t steps, bool padded);

STATESCAN_CPU_KERNEL(prepare_filter, FilterParams)
STATESCAN_CPU_KERNEL(fwd, FwdParams)
STATESCAN_CPU_KERNEL(bwd, BwdParams)
STATESCAN_CPU_KERNEL(update, UpdateParams)
STATESCAN_CPU_KERNEL(varlen_states, VarlenStatesParams)

}  // namespace statescan::causal_conv1d
