#include "ssd_scan/kernels.h"

namespace statescan::ssd_scan {
namespace {

constexpr int64_t kWidest = 16;  // lanes of the widest vector, and rows of the tallest block
constexpr int64_t kSteps = kTile + kWidest;

int64_t padded(int64_t count) { return (count + kWidest - 1) / kWidest * kWidest; }

}  // namespace

int64_t FwdParams::scratch_bytes() const {
  const int64_t wide_state = padded(state), wide_head = padded(headdim);
  const int64_t head_state = (state + kWidest) * wide_head;
  const int64_t scalars = 4 * kSteps * wide_state            // B, C and as pairs
                          + 2 * (state + kWidest) * kTile    // B transposed
                          + 3 * kSteps * kTile               // G, M
                          + 5 * kSteps * wide_head           // x, y, z, weighted
                          + heads_per_task * wide_head       // D
                          + 2 * heads_per_task * head_state  // S
                          + 2 * kSteps                       // ends
                          + 5 * (kTile + 2 * kWidest);       // see Decays
  return scalars * element_bytes(compute) + 32 * 64;
}

int64_t BwdParams::scratch_bytes() const {
  const int64_t wide_state = padded(state), wide_head = padded(headdim);
  const int64_t head_state = (state + kWidest) * wide_head;
  const int64_t scalars = 4 * kSteps * wide_state              // B, C and as pairs
                          + 8 * (state + kWidest) * kTile      // B, C, their gradients, transposed
                          + 10 * kSteps * kTile                // (step, step)
                          + 12 * kSteps * wide_head            // (step, headdim)
                          + 4 * (headdim + kWidest) * kTile    // (headdim, step)
                          + 2 * heads_per_task * wide_head     // D, dD
                          + (heads_per_task + 4) * head_state  // dS, S
                          + 4 * heads_per_task                 // dA, ddt_bias
                          + 64 * (kTile + 2 * kWidest);        // numbers for each step
  return scalars * element_bytes(compute) + 80 * 64;
}

}  // namespace statescan::ssd_scan
