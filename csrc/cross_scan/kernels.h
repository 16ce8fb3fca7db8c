// Parameters and entry points of the CPU kernels that move whole lines of channel-first tensors:
// cross_scan and cross_merge, and every other set of routes that goes along lines.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/isa.h"
#include "common/view.h"
#include "cross_scan/digits.h"

namespace statescan::cross_scan {

// One run of a route through tokens a stride apart.
struct Line {
  int64_t time;  // the first of its steps
  bool flip;     // the last token comes first
};

// A route made of lines of n tokens that cover the grid (plane, n, stride): line (p, s) goes through
// the tokens p * n * stride + i * stride + s, i < n. Rows have stride 1; columns of an H x W map have
// n = H and stride = W.
struct LineRoute {
  int64_t n, stride, planes;
  std::vector<Line> lines;  // (planes, stride)
  bool alike = true;        // all of them flip, or none
};

// Lines of at least so many tokens, and columns at least so many side by side: whole vectors of any
// instruction set. What is smaller goes by an index table, see route_gather/kernels.h.
inline constexpr int64_t kLeast = 16;

// The route in lines, if it is one that visits each of `length` tokens once, in lines long enough.
std::optional<LineRoute> in_lines(const DigitRoute& route, int64_t length);

// Routes that go along the rows and the columns of one grid: row p * n + i and column s of plane p
// meet in token (p * n + i) * stride + s. Every route is either all rows, each a line, or all columns.
struct Grid {
  int64_t planes, n, stride;
  bool columns;  // there are any
  std::vector<LineRoute> routes;
};

// The routes on one grid, if there is one: lines through several rows become one line for each.
std::optional<Grid> on_grid(const std::vector<LineRoute>& routes);

// A task is a plane: the tokens of one channel of one batch element.
struct ScanParams {
  int64_t batch, dim, length;
  bool stream;  // store past the caches
  const std::vector<LineRoute>* routes;
  View<4>
      tokens;     // (batch, route, dim, length), stride 1 along tokens; route stride 0: one for all
  View<4> stack;  // (batch, route, dim, length), stride 1 along time, the same dtype

  int64_t tasks() const { return batch * dim; }
  int64_t grain() const;
  int64_t scratch_bytes() const { return length * element_bytes(stack.dtype); }
};

struct MergeParams {
  int64_t batch, dim, length;
  bool sum;       // over the routes
  bool stream;    // store past the caches
  DType compute;  // kFloat32 or kFloat64
  const Grid* grid;
  View<4> stack;  // (batch, route, dim, length), stride 1 along time
  View<4>
      tokens;  // (batch, route, dim, length), stride 1 along tokens; of the first route if summed

  int64_t tasks() const { return batch * dim; }
  int64_t grain() const;
  int64_t scratch_bytes() const { return length * element_bytes(tokens.dtype); }
};

STATESCAN_CPU_KERNEL(scan, ScanParams)
STATESCAN_CPU_KERNEL(merge, MergeParams)

}  // namespace statescan::cross_scan
