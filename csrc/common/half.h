// Scalar 16-bit floats as bits: conversions that round to nearest even and keep NaN, on any machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace statescan {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

STATESCAN_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

STATESCAN_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

STATESCAN_HOST_DEVICE float to_float(float x) { return x; }
STATESCAN_HOST_DEVICE double to_float(double x) { return x; }
STATESCAN_HOST_DEVICE float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

STATESCAN_HOST_DEVICE float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small; the product mends it, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

template <class T>
STATESCAN_HOST_DEVICE T from_float(float x);

template <>
STATESCAN_HOST_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
STATESCAN_HOST_DEVICE double from_float<double>(float x) {
  return x;
}

template <>
STATESCAN_HOST_DEVICE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};  // a quiet NaN
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
STATESCAN_HOST_DEVICE Half from_float<Half>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // NaN
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds past the largest half
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves just the bits that a half keeps, rounded by the adder.
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    return {uint16_t(sign | rounded)};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {uint16_t(sign | (rounded - 0x38000000) >> 13)};
}

}  // namespace statescan
