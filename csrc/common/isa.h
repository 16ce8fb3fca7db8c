// The instruction sets the CPU kernels are compiled for, and the choice among them at run time.
//
// A kernel source is compiled once per instruction set, each time inside a namespace named after
// it (STATESCAN_ISA, set by CMake). STATESCAN_CPU_KERNEL declares all of them and an entry point of
// the same name that calls the chosen one. AVX-512 with bfloat16 products is worth a compilation of
// its own only where there are products of matrices: STATESCAN_CPU_KERNEL_BF16 is for those, the
// others run as AVX-512 there.
#pragma once

#include <cstdint>

namespace statescan {

enum class Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The one in use: the widest this machine has, or what STATESCAN_ISA in the environment asks for.
Isa isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // compiled in, and this machine has the instructions

// A share of the tasks of a kernel, [begin, end), and the memory to work in.
struct Range {
  int64_t begin;
  int64_t end;
  void* scratch;  // 64-byte aligned, of the size the op asks for
};

}  // namespace statescan

#if defined(STATESCAN_X86)
#define STATESCAN_CPU_KERNEL_WITH(name, Params, bf16)       \
  namespace baseline {                                      \
  void name(const Params& p, const Range& range);           \
  }                                                         \
  namespace avx2 {                                          \
  void name(const Params& p, const Range& range);           \
  }                                                         \
  namespace avx512 {                                        \
  void name(const Params& p, const Range& range);           \
  }                                                         \
  namespace avx512_bf16 {                                   \
  void name(const Params& p, const Range& range);           \
  }                                                         \
  inline void name(const Params& p, const Range& range) {   \
    switch (isa()) {                                        \
      case Isa::kAvx512Bf16: return bf16::name(p, range);   \
      case Isa::kAvx512: return avx512::name(p, range);     \
      case Isa::kAvx2: return avx2::name(p, range);         \
      case Isa::kBaseline: return baseline::name(p, range); \
    }                                                       \
  }
#define STATESCAN_CPU_KERNEL(name, Params) STATESCAN_CPU_KERNEL_WITH(name, Params, avx512)
#define STATESCAN_CPU_KERNEL_BF16(name, Params) STATESCAN_CPU_KERNEL_WITH(name, Params, avx512_bf16)
#else
#define STATESCAN_CPU_KERNEL(name, Params)        \
  namespace baseline {                            \
  void name(const Params& p, const Range& range); \
  }                                               \
  inline void name(const Params& p, const Range& range) { baseline::name(p, range); }
#define STATESCAN_CPU_KERNEL_BF16(name, Params) STATESCAN_CPU_KERNEL(name, Params)
#endif
