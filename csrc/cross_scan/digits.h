// Routes described by digits, for the CPU and the GPU.
#pragma once

#include <cstdint>
#include <vector>

namespace statescan::cross_scan {

// A digit of a route, see DigitRoute in python/statescan/routes/descriptor.py.
struct Digit {
  int64_t n, stride;
  bool flip, snake;
};

struct DigitRoute {
  std::vector<Digit> digits;  // the outermost first
  int64_t base = 0;
  bool rev = false;

  int64_t steps() const;
};

// The same route with as few digits as it takes: none of size 1, and neighbours that count through
// one evenly spaced run as one. A raster is one digit.
DigitRoute simplified(const DigitRoute& route);

// Does no token come twice? Told from the strides, each larger than all that is inside of it.
bool visits_once(const DigitRoute& route);

// The token at step t', before rev, and whether the innermost digit counts down there.
struct Place {
  int64_t token;
  bool down;
};
Place place(const DigitRoute& route, int64_t steps, int64_t t);

// The tokens of every step, in order of time.
void append_index(const DigitRoute& route, std::vector<int32_t>& index);

}  // namespace statescan::cross_scan
