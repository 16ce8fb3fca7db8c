// The gated norm's problem, for the CPU and the GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "common/view.h"

namespace statescan::gated_rms_norm {

enum class Gate : int8_t;

inline constexpr int kLead = 4;  // dimensions in front of the channels, merged where strides allow

using Rows = View<kLead + 1>;  // (lead..., dim)

struct Shape {
  int64_t rows, dim, group_size;
  int64_t lead[kLead];  // their product is rows
  Gate gate;
  bool subtract_mean;
  double eps;
  DType compute;         // kFloat32 or kFloat64
  View<1> weight, bias;  // (dim), or absent
  Rows x, z;             // z may be absent
  Rows residual;         // added to x, or absent
};

// Merges neighbouring dimensions of the rows where all operands (absent ones aside) allow it, and
// fills `lead` and the strides of the operands. `sizes` has `rank` dimensions, and `strides` as many
// for each operand. Returns false if more than kLead dimensions remain.
struct Operand {
  Rows* view;
  const int64_t* strides;
};
bool merge_rows(Shape& p, int rank, const int64_t* sizes, const std::vector<Operand>& operands);

}  // namespace statescan::gated_rms_norm
