// Parameters and launchers of the CUDA kernels of cross_scan and cross_merge for large channel-first
// maps: what goes along rows and columns needs no table. Anything else goes by the kernels of
// route_gather.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/cuda.h"
#include "common/view.h"
#include "cross_scan/digits.h"

namespace statescan::cross_scan::cuda {

// A route over an H x W map along its rows (dj is 1 or -1) or its columns (di is): it visits token
// (i, j) = i W + j at step begin + di i + dj j.
struct MapRoute {
  int64_t begin, di, dj;
  bool along_rows;
};

struct MapRoutes {
  static constexpr int kMost = 8;
  int H, W, count;
  MapRoute route[kMost];
};

// The routes in this form, if they are such, over a map that fills a tile well.
std::optional<MapRoutes> over_map(const std::vector<DigitRoute>& routes, int64_t length);

struct ScanParams {
  int64_t batch, dim;
  MapRoutes routes;
  View<4> tokens;  // (batch, route, dim, H * W), stride 1 along tokens; route stride 0: one for all
  View<4> stack;   // (batch, route, dim, H * W), stride 1 along time
};

struct MergeParams {
  int64_t batch, dim;
  MapRoutes routes;
  bool sum;        // over the routes; else tokens has one for each
  bool mean;       // divide the sum by their number
  View<4> stack;   // (batch, route, dim, H * W), stride 1 along time
  View<4> tokens;  // (batch, route, dim, H * W), stride 1 along tokens
};

// Elements of 2 or 4 bytes; merge: float, and not double.
void scan(const ScanParams& p, cudaStream_t stream);
void merge(const MergeParams& p, cudaStream_t stream);

}  // namespace statescan::cross_scan::cuda
