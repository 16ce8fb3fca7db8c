#include "selective_scan_2d/kernels.h"

namespace statescan::selective_scan_2d {
namespace {

constexpr int64_t kVector = 64;  // bytes of the widest vector

// Rows of narrow operands are a little longer than a chunk (cpu_walk.h).
constexpr int64_t kRow = kMaxChunk + 16;

// What cpu_walk.h's Operands takes, in vectors of kVector bytes and in narrow rows.
int64_t operand_bytes(const Problem& p, int64_t scalar) {
  const int64_t vectors = 2 * p.state + p.rank + 2 * (kMaxChunk + 16);
  return vectors * kVector + (2 * p.state + p.rank) * kRow * scalar + 8 * kVector;
}

}  // namespace

int64_t FwdParams::scratch_bytes() const {
  const int64_t scalar = element_bytes(compute);
  return operand_bytes(*this, scalar) + 2 * (tokens + 1) * kVector  // u, y
         + (state + kMaxChunk) * kVector + 8 * kVector;             // h, z
}

int64_t BwdParams::scratch_bytes() const {
  const int64_t scalar = element_bytes(compute);
  const int64_t held = state < 16 ? state : 16;
  const int64_t vectors = 4 * (tokens + 1)               // u, dy, du, y
                          + (delta_shared ? steps : 0)   // ddelta
                          + 2 * state                    // h0, dh
                          + routes * (state + rank + 3)  // dA, ddt_weight, dD, dbias, dweights
                          + 3 * kMaxChunk                // d_delta, d_delta_u, z
                          + (2 * kMaxChunk + 1) * held;  // h and a of every step
  return operand_bytes(*this, scalar) + vectors * kVector + 24 * kVector;
}

}  // namespace statescan::selective_scan_2d
