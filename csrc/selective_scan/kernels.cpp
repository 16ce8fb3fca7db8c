#include "selective_scan/kernels.h"

namespace statescan::selective_scan {
namespace {

constexpr int64_t kWidest = 16;  // lanes of the widest vector

int64_t scalar_bytes(DType compute) { return element_bytes(compute); }

int64_t pitch(int64_t state) { return (state + kWidest - 1) / kWidest * kWidest; }

}  // namespace

int64_t FwdParams::scratch_bytes() const {
  const int64_t channels = task_channels() + kWidest;
  const int64_t scalars = 2 * chunk * pitch(state)                // B, C
                          + 4 * chunk * kWidest                   // u, delta, z, y
                          + 4 * channels * state + 2 * channels;  // h, A, constant B and C
  return scalars * scalar_bytes(compute) + 16 * 64;
}

int64_t BwdParams::scratch_bytes() const {
  const int64_t channels = task_channels() + kWidest;
  const int64_t scalars = 4 * chunk * pitch(state)           // B, C and gradients
                          + 10 * chunk * kWidest             // see Backward
                          + 8 * channels * state             // tables
                          + state * kWidest + 4 * channels   // h0, dD, ddelta_bias
                          + (2 * chunk + 1) * 16 * kWidest;  // h and a of every step
  return scalars * scalar_bytes(compute) + 40 * 64;
}

}  // namespace statescan::selective_scan
