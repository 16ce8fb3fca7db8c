// Parameters and launchers of the CUDA kernels of route_gather and route_scatter, and of cross_scan
// and cross_merge, which are the same by other routes:
//
//   gather   stack[b, k, d, t] = tokens[b, d, token[k, t]]          (0 at a step of no token)
//   scatter  tokens[b, d, l] = sum over k and t with token[k, t] = l of stack[b, k, d, t]
#pragma once

#include <cstdint>
#include <vector>

#include "common/cuda.h"
#include "common/view.h"
#include "cross_scan/digits.h"

namespace statescan::route_gather::cuda {

// An index table as it was given, (table, count, steps), int32 or int64.
struct GivenTable {
  const void* data = nullptr;
  bool wide = false;  // int64
  int64_t stride[3] = {0, 0, 0};
};

// Routes on the device. One table for all batch elements, or one for each.
struct Routes {
  int64_t count, steps, length;
  bool per_batch;

  int64_t tables(int64_t batch) const { return per_batch ? batch : 1; }
};

// Which token each step visits, filled by the functions below.
struct Table : Routes {
  int32_t* token = nullptr;  // (table, count, steps): -1 at a step of no token
};

// Which steps visit each token, in order of time: `first`, next[first], next[next[first]], ...
struct Visits : Routes {
  int32_t* first = nullptr;  // (table, count, length): -1 where there is none
  int32_t* next = nullptr;   // (table, count, steps): -1 at the last; null if no token comes twice
};

// Every entry of a given table that is not one of `length` tokens becomes -1: whatever the table
// holds, no kernel leaves a tensor.
void read_table(const GivenTable& given, const Table& table, int64_t batch, cudaStream_t stream);
void expand(const std::vector<cross_scan::DigitRoute>& routes, const Table& table,
            cudaStream_t stream);
// Of routes that visit no token twice.
void invert(const std::vector<cross_scan::DigitRoute>& routes, const Visits& visits,
            cudaStream_t stream);
// Of any routes; next is not null.
void invert(const Table& table, const Visits& visits, int64_t batch, cudaStream_t stream);

struct GatherParams {
  int64_t batch, dim;
  Table table;
  View<4> tokens;  // (batch, route, dim, length), route stride 0: one for all
  View<4> stack;   // (batch, route, dim, steps), contiguous in one of the two layouts
};

struct ScatterParams {
  int64_t batch, dim;
  Visits visits;
  DType compute;   // kFloat32 or kFloat64
  bool sum;        // over the routes; else tokens has one for each
  bool mean;       // divide by the visits
  View<4> stack;   // (batch, route, dim, steps)
  View<4> tokens;  // (batch, route, dim, length), contiguous in one of the two layouts
};

// length > 0, and for scatter steps > 0.
void gather(const GatherParams& p, cudaStream_t stream);
void scatter(const ScatterParams& p, cudaStream_t stream);

}  // namespace statescan::route_gather::cuda
