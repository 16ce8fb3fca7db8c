// PTX of sm_90a, the Hopper architecture with its own features: what ptx.cuh is for all. The twins are
// in tests/simt/emulator/ptx90_twins.h. Code for other architectures sees kHopper == false; a kernel
// that calls these is empty there.
//
// A warpgroup is four neighbouring warps, the first of which has a number that is a multiple of 4.
// Fragments of its 64 x 64 x 16 product, warp w of the group, lane l, g = l / 4, m = l % 4:
//   d (32 floats): d[4 j + i] is row 16 w + g + i / 2 * 8, column 8 j + 2 m + i % 2
//   a (4 pairs): as of mma_16x8x16_bf16 (ptx.cuh), for rows 16 w ..
// So the d of columns 16 k .. 16 k + 15, rounded in pairs, are the a of depth 16 k ..
#pragma once

#include "common/ptx.cuh"

#if defined(STATESCAN_SIMT)
#include "ptx90_twins.h"
#else

namespace statescan::ptx {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHopper = true;
#else
inline constexpr bool kHopper = false;
#endif

// ---- registers of a warpgroup's threads: all four warps call it

template <int kCount>
__device__ __forceinline__ void have_more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void have_less_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// What this thread has written to shared memory is seen by wgmma of whoever comes after it.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Stores transposes: element (row, column) of matrix i, of lane 4 column + row / 2, half row % 2 of
// r[i], at [row][column]; lane l gives the 16-byte row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- products of a warpgroup, which run beside its threads

// Of a bfloat16 operand in shared memory in the 128-byte swizzle: of rows of 128 bytes, eight to 1024
// bytes, the 16-byte piece i of row r is where i ^ (r % 8) would be. `p` is aligned to 1024 bytes, and
// the operand begins so many pieces, unswizzled, after it. Eight rows are followed by the next
// eight. No operand here has more than 64 columns, for which there would be a leading offset.
__device__ __forceinline__ uint64_t wgmma_operand(const void* p, int pieces = 0) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32;
  constexpr uint32_t kNoLeadingOffset = 1 << 16;
  const uint32_t begin = (shared_address(p) & 0x3ffff) / 16 + uint32_t(pieces);
  return kSwizzle128 | kEightRows | (kNoLeadingOffset | begin);
}

__device__ __forceinline__ void keep(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int kSize>
__device__ __forceinline__ void keep(T (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) keep(x[i]);
}

// Hands over registers to the products that follow: sums, and left operands. They come back by a
// wgmma_wait that names them.
template <class... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... x) {
  (keep(x), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kGroups of the groups committed are under way.
template <int kGroups, class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... x) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  (keep(x), ...);
}

// d += a b of 64 x 64 x 16, or d = a b. a is [row][depth], b [column][depth] or, kDepthFirst,
// [depth][column].
template <bool kDepthFirst>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, %35;\n"
      "}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(int(add)), "n"(int(kDepthFirst))
      : "memory");
}

// d += a b with a in registers, b [depth][column].
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
      : "memory");
}

}  // namespace statescan::ptx

#endif
