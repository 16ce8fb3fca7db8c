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

// The same for 32 bits: one multiplication where the other takes four.
struct SmallDivisor {
  uint32_t divisor, reciprocal;  // floor(2^32 / divisor), or 2^32 - 1

  explicit SmallDivisor(int64_t d)
      : divisor(uint32_t(d)), reciprocal(d == 1 ? ~0u : uint32_t((uint64_t(1) << 32) / d)) {}

  STATESCAN_HOST_DEVICE uint32_t divide(uint32_t n, uint32_t& remainder) const {
    uint32_t quotient = uint32_t(uint64_t(n) * reciprocal >> 32);
    uint32_t rest = n - quotient * divisor;
    if (rest >= divisor) ++quotient, rest -= divisor;
    remainder = rest;
    return quotient;
  }
};

}  // namespace statescan
