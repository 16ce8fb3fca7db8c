#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace statescan {
namespace {

// widest first
constexpr Isa kAll[] = {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kBaseline};

Isa choose() {
  const char* asked = std::getenv("STATESCAN_ISA");
  if (asked == nullptr || *asked == '\0') {
    for (Isa candidate : kAll) {
      if (isa_supported(candidate)) return candidate;
    }
  }
  std::string known;
  for (Isa candidate : kAll) {
    if (!isa_supported(candidate)) continue;
    if (std::string(asked) == isa_name(candidate)) return candidate;
    known += known.empty() ? isa_name(candidate) : std::string(", ") + isa_name(candidate);
  }
  throw std::invalid_argument("STATESCAN_ISA must be one of " + known + " on this machine, got " +
                              asked);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kBaseline: return "baseline";
  }
  return "unknown";
}

bool isa_supported(Isa isa) {
#if defined(STATESCAN_X86)
  switch (isa) {
    case Isa::kAvx512Bf16:
      return isa_supported(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma");
    case Isa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kBaseline: return true;
  }
#endif
  return isa == Isa::kBaseline;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace statescan
