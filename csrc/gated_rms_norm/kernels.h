// Parameters and entry points of the gated norm's CPU kernels.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/isa.h"
#include "gated_rms_norm/shape.h"

namespace statescan::gated_rms_norm {

inline constexpr int kBatch =
    8;  // rows that take turns, where they are short: 30 to 90 % faster below 256

// A task is a range of rows, whatever the threads and the instruction set: sums over rows are taken
// in the order of rows within a task, then in the order of tasks.
struct Problem : Shape {
  // All operands of the rows are of one type, with channels next to each other, and nothing is added
  // to x: read and written in place. Otherwise by way of tiles in the compute type.
  bool in_place;

  // Rows that a thread takes at once hold some 16000 elements: to wake another costs as much.
  int64_t grain(int64_t tasks) const { return rows * dim <= 16384 ? tasks : 1; }
  STATESCAN_HOST_DEVICE int64_t batch() const {
    const int64_t rows = 1024 / (group_size > 0 ? group_size : 1);
    return rows < 1 ? 1 : rows > kBatch ? kBatch : rows;
  }
  // Rows in one tile. Sixteen, where they fit the cache: rows that lie next to each other in memory,
  // as in a channel-first tensor, are transposed together.
  STATESCAN_HOST_DEVICE int64_t tile_rows() const {
    const int64_t rows = 16384 / (group_size > 0 ? group_size : 1);
    return rows < 4 ? 4 : rows > 16 ? 16 : rows;
  }
  // Elements from one row of a tile to the next: whole vectors, and one more, so that rows of a
  // power of two do not share a set of the cache.
  STATESCAN_HOST_DEVICE int64_t pitch() const { return (group_size + 15) / 16 * 16 + 16; }
  int64_t tile_bytes(int tiles) const {
    return tiles * (tile_rows() * pitch() * element_bytes(compute) + 64);
  }
  int64_t batch_bytes() const { return batch() * pitch() * element_bytes(compute) + 64; }
  int64_t parameter_bytes() const { return 2 * (dim * element_bytes(compute) + 64); }
};

struct FwdParams : Problem {
  Rows y;
  Rows residual_out;  // x + residual, or absent

  int64_t rows_per_task() const {
    const int64_t rows = 32768 / (dim > 0 ? dim : 1);
    return rows < 1 ? 1 : rows;
  }
  int64_t tasks() const { return (rows + rows_per_task() - 1) / rows_per_task(); }
  int64_t scratch_bytes() const {
    return parameter_bytes() + batch_bytes() + tile_bytes(in_place ? 0 : 3);
  }
};

struct BwdParams : Problem {
  Rows dy;             // or absent: zero
  Rows dresidual_out;  // or absent: zero
  Rows dx, dz;         // dz as z
  Rows dresidual;      // or absent: dx is the same
  // (task, 2, dim): partial sums of dweight and dbias in the compute type; or null
  void* dparameters;

  int64_t tasks() const {
    const int64_t by_elements = rows * dim / 32768, by_rows = rows / 8;
    const int64_t count = by_elements < by_rows ? by_elements : by_rows;
    return rows == 0 ? 0 : count < 1 ? 1 : count > 64 ? 64 : count;
  }
  STATESCAN_HOST_DEVICE int64_t first_row(int64_t task, int64_t tasks) const {
    return rows * task / tasks;
  }
  int64_t scratch_bytes() const {
    return parameter_bytes() + batch_bytes() + tile_bytes(in_place ? 0 : 6);
  }
};

STATESCAN_CPU_KERNEL(fwd, FwdParams)
STATESCAN_CPU_KERNEL(bwd, BwdParams)

}  // namespace statescan::gated_rms_norm
