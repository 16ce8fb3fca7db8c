#include "cross_scan/kernels.h"

#include <algorithm>

namespace statescan::cross_scan {
namespace {

// Rows of a multiple of n tokens as rows of n.
LineRoute in_rows(const LineRoute& route, int64_t n) {
  LineRoute out{n, 1, route.planes * (route.n / n), {}, route.alike};
  for (const Line& line : route.lines) {
    for (int64_t at = 0; at < route.n; at += n) {
      out.lines.push_back({line.time + (line.flip ? route.n - n - at : at), line.flip});
    }
  }
  return out;
}

constexpr int64_t kTaskElements = 1 << 15;  // that one share of the work should move at least

// Many planes make long shares: whoever asks for the next plane should be the one that works on it.
int64_t grain_of(int64_t tasks, int64_t elements) {
  return std::max({int64_t(1), tasks / 64, kTaskElements / std::max<int64_t>(elements, 1)});
}

}  // namespace

std::optional<LineRoute> in_lines(const DigitRoute& route, int64_t length) {
  const DigitRoute r = simplified(route);
  if (r.steps() != length || r.digits.empty()) return {};
  const Digit& inner = r.digits.back();
  LineRoute out{inner.n, inner.stride, 0, {}};
  if (inner.n < kLeast || inner.stride < 1 || length % (inner.n * inner.stride) != 0) return {};
  if (inner.stride != 1 && inner.stride < kLeast) return {};
  out.planes = length / (inner.n * inner.stride);
  out.lines.assign(out.planes * inner.stride, Line{-1, false});
  const bool first_down = place(r, length, 0).down;
  for (int64_t t = 0; t < length; t += inner.n) {
    const Place first = place(r, length, t);
    const int64_t low = first.token - (first.down ? (inner.n - 1) * inner.stride : 0);
    if (low < 0 || low >= length) return {};
    const int64_t p = low / (inner.n * inner.stride), s = low % (inner.n * inner.stride);
    if (s >= inner.stride) return {};
    Line& line = out.lines[p * inner.stride + s];
    if (line.time >= 0) return {};
    line = r.rev ? Line{length - inner.n - t, !first.down} : Line{t, first.down};
    out.alike = out.alike && line.flip == (first_down != r.rev);
  }
  return out;
}

std::optional<Grid> on_grid(const std::vector<LineRoute>& routes) {
  const auto narrower = [](const LineRoute& a, const LineRoute& b) {
    return std::pair(a.stride == 1, a.n) < std::pair(b.stride == 1, b.n);
  };
  const LineRoute& first = *std::min_element(routes.begin(), routes.end(), narrower);
  Grid grid{first.planes, first.n, first.stride, first.stride != 1, {}};
  if (!grid.columns) grid.n = 1, grid.stride = first.n;
  for (const LineRoute& route : routes) {
    const bool fits = route.stride == 1 ? route.n % grid.stride == 0
                                        : route.n == grid.n && route.stride == grid.stride;
    if (!fits) return {};
    grid.routes.push_back(route.stride == 1 ? in_rows(route, grid.stride) : route);
  }
  return grid;
}

int64_t ScanParams::grain() const { return grain_of(tasks(), length * int64_t(routes->size())); }

int64_t MergeParams::grain() const {
  return grain_of(tasks(), length * int64_t(grid->routes.size()));
}

}  // namespace statescan::cross_scan
