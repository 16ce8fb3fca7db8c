// The two loops whose speed is the ceiling of any kernel here.
#include "common/ceilings.h"
#include "common/vector_math.h"

namespace statescan::ceilings {
namespace STATESCAN_ISA {

// exp2 of numbers in first-level cache, one vector at a time; no result needs another.
void exp2_task(const Params& p, const Range& range) {
  constexpr int n = kLanes<float>;
  float* in = static_cast<float*>(range.scratch);
  float* out = in + Params::kExps;
  for (int64_t i = 0; i < Params::kExps; ++i) in[i] = -16.0f * float(i) / float(Params::kExps);
  for (int64_t task = range.begin; task < range.end; ++task) {
    for (int64_t r = 0; r < p.repetitions; ++r) {
      for (int64_t i = 0; i < Params::kExps; i += n) store(out + i, exp2(load(in + i)));
      asm volatile("" ::: "memory");  // each repetition is really carried out
    }
  }
}

// Independent chains of x a + b in registers.
void fma_task(const Params& p, const Range& range) {
  constexpr int n = kLanes<float>;
  const FloatVec a = splat(0.5f), b = splat(0.25f);
  FloatVec x[Params::kChains];
  for (int c = 0; c < Params::kChains; ++c) x[c] = splat(float(c));
  for (int64_t task = range.begin; task < range.end; ++task) {
    for (int64_t i = 0; i < p.repetitions * Params::kSteps; ++i) {
#pragma GCC unroll 12
      for (int c = 0; c < Params::kChains; ++c) x[c] = x[c] * a + b;
    }
  }
  float* out = static_cast<float*>(range.scratch);
  for (int c = 0; c < Params::kChains; ++c) store(out + c * n, x[c]);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::ceilings
