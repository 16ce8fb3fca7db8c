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
  DType compute;         // kFloat32, or kFloat64
  const int32_t* index;  // (batch, count, steps)
  int64_t index_stride;  // from one batch element to the next; 0: the same for all
  View<4> tokens;        // (batch, route, dim, length), route stride 0: one for all
  View<4> stack;         // (batch, route, dim, steps)

  static constexpr int64_t kChannels = 16;  // of a task: the lanes of the widest vector
  static constexpr int64_t kTile = 64;      // steps that are loaded at a time

  int64_t blocks() const { return (dim + kChannels - 1) / kChannels; }
  int64_t tasks() const { return batch * blocks(); }
  int64_t grain() const;
  // Tokens of the channels of a task, and a tile of them.
  int64_t scratch_bytes() const {
    return (length + kTile) * kChannels * element_bytes(compute) + 2 * 64;
  }
};

struct GatherParams : Problem {};

struct ScatterParams : Problem {
  bool sum;           // over the routes; else tokens has one for each
  const float* scale;  // (batch, length), times each token; or null
  int64_t scale_stride;
};

STATESCAN_CPU_KERNEL(gather, GatherParams)
STATESCAN_CPU_KERNEL(scatter, ScatterParams)

}  // namespace statescan::route_gather
