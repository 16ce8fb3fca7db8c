#include "cross_scan/digits.h"

#include <algorithm>
#include <cstdlib>

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

}  // namespace

int64_t DigitRoute::steps() const {
  int64_t steps = 1;
  for (const Digit& digit : digits) steps *= digit.n;
  return steps;
}

DigitRoute simplified(const DigitRoute& route) { return merged(without_rev(route)); }

bool visits_once(const DigitRoute& route) {
  std::vector<Digit> digits = simplified(route).digits;
  std::sort(digits.begin(), digits.end(),
            [](const Digit& a, const Digit& b) { return std::abs(a.stride) < std::abs(b.stride); });
  int64_t reach = 0;  // of the digits so far
  for (const Digit& digit : digits) {
    if (std::abs(digit.stride) <= reach) return false;
    reach += (digit.n - 1) * std::abs(digit.stride);
  }
  return true;
}

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

}  // namespace statescan::cross_scan
