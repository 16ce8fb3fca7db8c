// Parameters and launchers of the gated norm's CUDA kernels.
#pragma once

#include "common/cuda.h"
#include "gated_rms_norm/shape.h"

namespace statescan::gated_rms_norm::cuda {

struct FwdParams : Shape {
  Rows y;
  Rows residual_out;  // x + residual, or absent
};

struct BwdParams : Shape {
  Rows dy;                 // or absent: zero
  Rows dresidual_out;      // or absent: zero
  Rows dx, dz;             // dz as z
  Rows dresidual;          // or absent: dx is the same
  View<1> dweight, dbias;  // (dim), or absent
  void* partial;           // (parts, 2, dim): sums of dweight and dbias of some rows each, or null

  // Enough blocks to fill a GPU twice, as long as each has some rows to add up.
  int64_t parts() const {
    const int64_t groups = dim / group_size, wanted = 528 / groups + 1, most = (rows + 7) / 8;
    return wanted < most ? wanted : most;
  }
};

void fwd(const FwdParams& p, cudaStream_t stream);
void bwd(const BwdParams& p, cudaStream_t stream);

}  // namespace statescan::gated_rms_norm::cuda
