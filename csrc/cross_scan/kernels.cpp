#include "cross_scan/kernels.h"

#include <algorithm>

namespace statescan::cross_scan {
namespace {

// Reversing time counts every digit down; a digit that snakes does so by what is outside of it,
// which is reversed as well, so rev stays where there is one.
DigitRoute without_rev(DigitRoute route) {
  const bool snakes = std::any_of(route.digits.begin(), route.digits.end(),
                                  [](const Digit& digit) { return digit.snake; });
  if (!route.rev || snakes) return route;
  for (Digit& digit : route.digits) digit.flip = !digit.flip;
  route.rev = false;
  return route;
}

// Neighbouring digits that count through one evenly spaced run become one: a raster is one line.
DigitRoute merged(DigitRoute route) {
  std::vector<Digit> digits;
  for (const Digit& inner : route.digits) {
    if (inner.n == 1) continue;
    Digit* outer = digits.empty() ? nullptr : &digits.back();
    const bool joins = outer != nullptr && !outer->snake && !inner.snake &&
                       outer->flip == inner.flip && outer->stride == inner.n * inner.stride;
    if (joins) {
      outer->n *= inner.n, outer->stride = inner.stride;
    } else {
      digits.push_back(inner);
    }
  }
  if (!digits.empty()) digits.front().snake = false;  // there is nothing outside of it
  route.digits = std::move(digits);
  return route;
}

// The token at step t', before rev, and whether the innermost digit counts down there.
struct Place {
  int64_t token;
  bool down;
};

Place place(const DigitRoute& route, int64_t steps, int64_t t) {
  Place at{route.base, false};
  int64_t inner = steps;
  for (const Digit& digit : route.digits) {
    const int64_t outside = t / inner;
    inner /= digit.n;
    const int64_t c = t / inner % digit.n;
    at.down = digit.flip != (digit.snake && outside % 2 == 1);
    at.token += digit.stride * (at.down ? digit.n - 1 - c : c);
  }
  return at;
}

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

int64_t DigitRoute::steps() const {
  int64_t steps = 1;
  for (const Digit& digit : digits) steps *= digit.n;
  return steps;
}

void append_index(const DigitRoute& route, std::vector<int32_t>& index) {
  const int64_t steps = route.steps();
  if (steps == 0) return;
  const size_t begin = index.size();
  const int64_t n = route.digits.empty() ? 1 : route.digits.back().n;
  const int64_t stride = route.digits.empty() ? 0 : route.digits.back().stride;
  for (int64_t t = 0; t < steps; t += n) {
    const Place first = place(route, steps, t);
    const int64_t step = first.down ? -stride : stride;
    for (int64_t i = 0; i < n; ++i) index.push_back(int32_t(first.token + i * step));
  }
  if (route.rev) std::reverse(index.begin() + begin, index.end());
}

std::optional<LineRoute> in_lines(const DigitRoute& route, int64_t length) {
  const DigitRoute r = merged(without_rev(route));
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
