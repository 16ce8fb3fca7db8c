// Division by a number that a whole launch shares: a few multiplications instead of a call of the
// some hundred instructions that a GPU takes for 64 bits.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace statescan {

struct Divisor {
  uint64_t divisor, reciprocal;  // floor(2^64 / divisor), or 2^64 - 1

  explicit Divisor(int64_t d)
      : divisor(uint64_t(d)),
        reciprocal(d == 1 ? ~uint64_t(0) : uint64_t(((unsigned __int128)1 << 64) / uint64_t(d))) {}

  // n = quotient * divisor + remainder for n >= 0. The estimate is at most one too small.
  STATESCAN_HOST_DEVICE int64_t divide(int64_t n, int64_t& remainder) const {
    uint64_t quotient = uint64_t((unsigned __int128)uint64_t(n) * reciprocal >> 64);
    uint64_t rest = uint64_t(n) - quotient * divisor;
    if (rest >= divisor) ++quotient, rest -= divisor;
    remainder = int64_t(rest);
    return int64_t(quotient);
  }
};

}  // namespace statescan
