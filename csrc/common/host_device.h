// Marks code that the CPU and the GPU both compile. Always inlined: the CPU kernels are compiled
// once per instruction set, and a shared out-of-line copy would carry the instructions of whichever
// object file the linker happened to keep.
#pragma once

#if defined(__CUDACC__)
#define STATESCAN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define STATESCAN_HOST_DEVICE inline __attribute__((always_inline))
#endif
