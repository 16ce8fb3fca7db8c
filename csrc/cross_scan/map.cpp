#include "cross_scan/cuda.h"
#include "cross_scan/tiles.h"

namespace statescan::cross_scan::cuda {
namespace {

// A raster has one digit; its map is that of the others.
bool is_raster(const DigitRoute& r) { return r.digits.size() == 1 && r.digits[0].stride == 1; }

MapRoute raster(const DigitRoute& r, int64_t length, int64_t W) {
  if (r.digits[0].flip) return {length - 1, -W, -1, true};
  return {0, W, 1, true};
}

// From two digits, one of which counts columns and the other rows.
MapRoute lines(const DigitRoute& r) {
  const bool rows_inside = r.digits[1].stride != 1;
  const Digit& row = r.digits[rows_inside];
  const Digit& column = r.digits[!rows_inside];
  int64_t di = rows_inside ? 1 : column.n, dj = rows_inside ? row.n : 1, begin = 0;
  if (row.flip) begin += di * (row.n - 1), di = -di;
  if (column.flip) begin += dj * (column.n - 1), dj = -dj;
  return {begin, di, dj, !rows_inside};
}

}  // namespace

std::optional<MapRoutes> over_map(const std::vector<DigitRoute>& routes, int64_t length) {
  MapRoutes map{0, 0, int(routes.size()), {}};
  if (routes.size() > MapRoutes::kMost) return {};
  for (const DigitRoute& given : routes) {
    const DigitRoute r = simplified(given);
    if (r.base != 0 || r.rev || r.steps() != length) return {};
    if (is_raster(r)) continue;
    if (r.digits.size() != 2 || r.digits[0].snake || r.digits[1].snake) return {};
    const bool rows_inside = r.digits[1].stride != 1;
    const Digit& row = r.digits[rows_inside];
    const Digit& column = r.digits[!rows_inside];
    if (column.stride != 1 || row.stride != column.n) return {};
    if (map.W != 0 && map.W != column.n) return {};
    map.H = int(row.n), map.W = int(column.n);
  }
  if (map.H < kLeastSide || map.W < kLeastSide) return {};
  for (int k = 0; k < map.count; ++k) {
    const DigitRoute r = simplified(routes[k]);
    map.route[k] = is_raster(r) ? raster(r, length, map.W) : lines(r);
  }
  return map;
}

}  // namespace statescan::cross_scan::cuda
