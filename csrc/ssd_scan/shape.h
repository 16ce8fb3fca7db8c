// Sizes and flags of the SSD scan, which its kernels for the CPU and for CUDA share.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/view.h"

namespace statescan::ssd_scan {

inline constexpr int64_t kTile = 64;  // steps computed at once, at most

struct Shape {
  int64_t batch, seqlen, heads, headdim, state, groups;
  int64_t chunk;  // steps between two states that are returned
  bool dt_softplus, reverse, shift_output;
  bool has_dt;  // else the decay is given
  double dt_min, dt_max;
  DType compute;  // kFloat32 or kFloat64
  bool bfloat16;  // x, B and C are, and products are of bfloat16 numbers

  STATESCAN_HOST_DEVICE int64_t chunks() const { return (seqlen + chunk - 1) / chunk; }
  // A chunk is computed in equal cells of at most kTile steps.
  STATESCAN_HOST_DEVICE int64_t cells_per_chunk() const { return (chunk + kTile - 1) / kTile; }
  STATESCAN_HOST_DEVICE int64_t cell() const {
    return (chunk + cells_per_chunk() - 1) / cells_per_chunk();
  }
  STATESCAN_HOST_DEVICE int64_t cells() const {
    const int64_t last = seqlen - (chunks() - 1) * chunk;  // steps of the last chunk
    return seqlen == 0 ? 0 : (chunks() - 1) * cells_per_chunk() + (last + cell() - 1) / cell();
  }
  // Saved states become factors of products and nothing else.
  STATESCAN_HOST_DEVICE DType cell_dtype() const { return bfloat16 ? DType::kBFloat16 : compute; }
  STATESCAN_HOST_DEVICE int64_t group_heads() const { return heads / groups; }
};

}  // namespace statescan::ssd_scan
