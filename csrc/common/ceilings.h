// What this machine can do at most, for the benchmarks to measure the operators against: the rate
// of the library's own vector exp2 and of fused multiply-adds, with nothing around them.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace statescan::ceilings {

// Every task repeats the same work; how many a thread takes does not matter.
struct Params {
  int64_t repetitions;  // of the inner loop

  static constexpr int64_t kExps = 2048;   // of one repetition: 8 KiB in, 8 KiB out, both in L1
  static constexpr int64_t kChains = 12;   // more than the latency times the units of any machine
  static constexpr int64_t kSteps = 1024;  // of each chain in one repetition
  static constexpr int64_t scratch_bytes() { return 2 * kExps * int64_t(sizeof(float)); }
};

STATESCAN_CPU_KERNEL(exp2_task, Params)
STATESCAN_CPU_KERNEL(fma_task, Params)

}  // namespace statescan::ceilings
