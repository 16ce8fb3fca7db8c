// Parameters and entry points of the CPU kernels of route_gather and route_scatter, by index tables:
//
//   gather   stack[b, k, d, t] = tokens[b, d, index[k, t]]          (0 where the index is negative)
//   scatter  tokens[b, d, l] = sum over k and t with index[k, t] = l of stack[b, k, d, t]
//
// Each is the other's adjoint.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace statescan::route_gather {

// A task is a block of channels of one batch element: all of its steps, so that one owner adds up
// all visits of a token, in the order of routes and steps.
struct Problem {
  int64_t batch, count, dim, length, steps;
  const int32_t* index;  // (batch, count, steps)
  int64_t index_stride;  // from one batch element to the next; 0: the same for all
  View<4> tokens;        // (batch, route, dim, length), route stride 0: one for all
  View<4> stack;         // (batch, route, dim, steps)

  static constexpr int64_t kChannels = 32;  // of a task: two of the widest vectors

  int64_t blocks() const { return (dim + kChannels - 1) / kChannels; }
  int64_t tasks() const { return batch * blocks(); }
  int64_t grain() const;
};

struct GatherParams : Problem {
  bool stream;  // store past the caches

  static constexpr int64_t kStretch = 256;  // steps that are put together before they are stored
  // A vector for each token and for each step of a stretch.
  int64_t scratch_bytes() const { return (length + kStretch) * 64 + 2 * 64; }
};

struct ScatterParams : Problem {
  DType compute;       // kFloat32, or kFloat64
  bool sum;            // over the routes; else tokens has one for each
  const float* scale;  // (batch or 1, length), times each token; or null
  int64_t scale_stride;

  static constexpr int64_t kTile = 64;  // steps that are loaded at a time
  // A vector for each token, and for each step of a tile.
  int64_t scratch_bytes() const { return (length + kTile) * 64 + 2 * 64; }
};

// Both sides channel-last: a row is the channels of one token at one step. A task is a block of rows
// of the result of one batch element, worked on in stretches that stay in cache.
struct RowsProblem {
  int64_t batch, count, dim, length, steps;
  bool stream;  // store past the caches
  DType compute;
  const int32_t* index;  // as above
  int64_t index_stride;
  View<4> tokens;  // (batch, route, dim, length), stride 1 along channels
  View<4> stack;   // (batch, route, dim, steps), stride 1 along channels

  static constexpr int64_t kStretchBytes = 1 << 14, kBlockBytes = 1 << 17;
};

struct GatherRowsParams : RowsProblem {
  int64_t row_bytes() const { return count * dim * element_bytes(stack.dtype); }  // of a step
  int64_t stretch() const { return kStretchBytes / row_bytes() + 1; }
  int64_t block() const { return (kBlockBytes / kStretchBytes) * stretch(); }
  int64_t blocks() const { return (steps + block() - 1) / block(); }
  int64_t tasks() const { return batch * blocks(); }
  int64_t scratch_bytes() const { return stretch() * row_bytes() + 64; }
};

// The rows of the result are tokens, or the pairs (token, route) if the routes are not summed.
struct ScatterRowsParams : RowsProblem {
  bool sum;
  const int32_t* first;   // (batch or 1, rows + 1): where the visits of a row begin
  const int32_t* visits;  // (batch or 1, count * steps): k * steps + t, in this order for each row
  const float* scale;     // (batch or 1, length), or null
  int64_t scale_stride;

  int64_t rows() const { return sum ? length : length * count; }
  int64_t row_bytes() const { return dim * element_bytes(tokens.dtype); }
  int64_t stretch() const { return kStretchBytes / row_bytes() + 1; }
  int64_t block() const { return (kBlockBytes / kStretchBytes / 4) * stretch(); }
  int64_t blocks() const { return (rows() + block() - 1) / block(); }
  int64_t tasks() const { return batch * blocks(); }
  int64_t scratch_bytes() const {
    return stretch() * row_bytes() + dim * element_bytes(compute) + 2 * 64;
  }
};

STATESCAN_CPU_KERNEL(gather, GatherParams)
STATESCAN_CPU_KERNEL(scatter, ScatterParams)
STATESCAN_CPU_KERNEL(gather_rows, GatherRowsParams)
STATESCAN_CPU_KERNEL(scatter_rows, ScatterRowsParams)

}  // namespace statescan::route_gather
