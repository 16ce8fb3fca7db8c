// Kernels with faults to plant: run(0) is right, run(fault) is wrong in the way its name says, and
// the emulator must report it (test_faults.py says in which words), whatever the schedule.
#include <iterator>
#include <string>

#include "common/half.h"
#include "common/lanes.cuh"
#include "common/ptx90.cuh"
#include "common/shared.cuh"
#include "device_memory.h"

namespace statescan::tests {
namespace {

constexpr unsigned kAll = 0xffffffffu;

struct Row {
  SharedArray<int, 64> x;
  int after;
  float4 vector;
};

// ---- barriers

__global__ void reverse_kernel(const int* x, int* y, int fault) {
  auto& s = block_shared<Row>();
  const int t = int(threadIdx.x);
  s.x[t] = x[t];
  if (fault != 1) __syncthreads();  // written
  y[t] = s.x[63 - t];
  if (fault != 2) __syncthreads();  // read
  s.x[t] = t;
  __syncthreads();  // written again
  y[t] += s.x[(t + 1) % 64];
}

void reverse(int fault) {
  DeviceArray<int> x(64, 1), y(64);
  launch("reverse", reverse_kernel, 1, 64, 0, nullptr, x.data(), y.data(), fault);
}

__global__ void divergent_kernel(int* y, int fault) {
  const int t = int(threadIdx.x);
  if (fault == 1 && t % 2 == 1) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (fault == 2 && t < 32) return;  // the other warp counts on this one
  ptx::barrier_sync(1, 64);
  y[t] = t;
}

void divergent(int fault) {
  DeviceArray<int> y(64);
  launch("divergent", divergent_kernel, 1, 64, 0, nullptr, y.data(), fault);
}

__global__ void warp_exchange_kernel(int* y, int fault) {
  auto& s = block_shared<Row>();
  const int t = int(threadIdx.x);
  s.x[t] = t;
  if (fault != 1) __syncwarp();
  y[t] = s.x[t ^ 1];
}

void warp_exchange(int fault) {
  DeviceArray<int> y(64);
  launch("warp exchange", warp_exchange_kernel, 1, 64, 0, nullptr, y.data(), fault);
}

struct Slots {
  int slot[2][32];
};

__global__ void hand_over_kernel(int* y, int fault) {
  auto& s = block_shared<Slots>();
  const int l = int(threadIdx.x) % 32;
  if (threadIdx.x < 32) {
    for (int i = 0; i < 4; ++i) {
      if (i >= 2 && fault != 1) ptx::barrier_sync(3 + i % 2, 64);
      s.slot[i % 2][l] = i;
      ptx::barrier_arrive(1 + i % 2, 64);
    }
    return;
  }
  for (int i = 0; i < 4; ++i) {
    if (fault != 2) ptx::barrier_sync(1 + i % 2, 64);
    y[l] = s.slot[i % 2][31 - l];
    if (i < 2) ptx::barrier_arrive(3 + i % 2, 64);
  }
}

void hand_over(int fault) {
  DeviceArray<int> y(32);
  launch("hand over", hand_over_kernel, 1, 64, 0, nullptr, y.data(), fault);
}

// ---- warps

__global__ void warp_sum_kernel(int* y, int fault) {
  const int l = int(threadIdx.x);
  int sum = l;
  if (fault == 1 && l >= 16) {  // a shuffle that the rest of the warp does not reach
    y[l] = 0;
    return;
  }
  if (fault == 2 && l < 16) sum = __shfl_xor_sync(kAll, sum, 1);
  sum += __shfl_xor_sync(fault == 3 ? 0x0000ffffu : kAll, sum, 16);
  y[l] = sum;
}

void warp_sum(int fault) {
  DeviceArray<int> y(32);
  launch("warp sum", warp_sum_kernel, 1, 32, 0, nullptr, y.data(), fault);
}

// ---- bounds, alignment, initial values

__global__ void bounds_kernel(const float* x, float* y, int n, int fault) {
  auto& s = block_shared<Row>();
  int* dynamic = dynamic_shared<int>();
  const int t = int(threadIdx.x);
  s.x[fault == 1 ? t + 1 : t] = t;  // the last one would hit `after`
  dynamic[fault == 2 ? t + 1 : t] = t;
  if (t < n || (fault == 3 && t == n)) y[t] = 2 * x[fault == 4 ? t + 1 : t];
  if (fault == 5 && t == 0) y[-1] = 0;
  if (fault == 6) y[t % n] += float(s.after);
  if (fault == 7 && t == 0) s.vector = *reinterpret_cast<const float4*>(x + 1);
  if (fault == 8 && t == 0) *reinterpret_cast<float*>(uintptr_t(n) * 64) = 0;  // no memory
  if (fault == 9 && t == 0) ptx::prefetch(x + n);
}

void bounds(int fault) {
  DeviceArray<float> x(37, 1), y(37);
  launch("bounds", bounds_kernel, 1, 64, 64 * sizeof(int), nullptr, x.data(), y.data(), 37, fault);
}

struct Matrices {
  alignas(16) SharedArray<uint16_t, 4 * 64> element;
};

// Instructions for one kind of memory; vectors whose numbers are used one by one.
__global__ void spaces_kernel(const uint16_t* x, uint32_t* y, int fault) {
  auto& s = block_shared<Matrices>();
  const int l = int(threadIdx.x);
  for (int i = l; i < 256; i += 32) s.element[i] = x[i];
  __syncwarp();
  uint32_t r[4];
  const void* row = fault == 1 ? static_cast<const void*>(x + 8 * l) : &s.element[8 * l];
  ptx::ldmatrix_x4(r, row);
  const uint4 v = *reinterpret_cast<const uint4*>(x + 8 * (l % 16) + (fault == 2 ? 2 : 0));
  const auto two = several<2>(y[2 * l + (fault == 3 ? 1 : 0)]);
  __syncwarp();  // y has been read
  uint4* to =
      reinterpret_cast<uint4*>(fault == 4 ? static_cast<void*>(&s.element[8 * l]) : y + 4 * l);
  ptx::store(to, {r[0], r[1], v.x + v.w, two.x[1]});
  if (fault == 5) y[l] = __ldg(&s.element[l]);
}

void spaces(int fault) {
  DeviceArray<uint16_t> x(256, 1);
  DeviceArray<uint32_t> y(128);
  launch("spaces", spaces_kernel, 1, 32, 0, nullptr, x.data(), y.data(), fault);
}

// ---- races on global memory

__global__ void add_kernel(int* sum, int fault) {
  if (fault == 1) {
    *sum += 1;
  } else if (fault == 2 && blockIdx.x == 0) {
    *sum = 1;
  } else {
    atomicAdd(sum, 1);
  }
}

void add(int fault) {
  DeviceArray<int> sum(1);
  launch("add", add_kernel, 4, 32, 0, nullptr, sum.data(), fault);
}

struct LastFlag {
  int last;
};

__global__ void last_block_kernel(int* partial, unsigned* ticket, int* out, int fault) {
  auto& s = block_shared<LastFlag>();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = int(blockIdx.x);
    if (fault != 1) __threadfence();
    s.last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (fault != 2) __threadfence();
  }
  __syncthreads();
  if (!s.last) return;
  if (threadIdx.x == 1) {
    for (unsigned i = 0; i < gridDim.x; ++i) *out += partial[i];
  }
}

void last_block(int fault) {
  DeviceArray<int> partial(6), out(1);
  DeviceArray<unsigned> ticket(1);
  launch("last block", last_block_kernel, 6, 32, 0, nullptr, partial.data(), ticket.data(),
         out.data(), fault);
}

__global__ void chain_kernel(int* sums, unsigned* flag, unsigned* ticket, int fault) {
  if (threadIdx.x != 0) return;
  const int tile = fault == 3 ? int(gridDim.x - 1 - blockIdx.x) : int(atomicAdd(ticket, 1u));
  int sum = 1;
  if (tile > 0) {
    if (fault == 2) {
      while (ptx::ld_relaxed(flag + tile - 1) == 0) {
      }
    } else {
      while (ptx::ld_acquire(flag + tile - 1) == 0) {
      }
    }
    sum += sums[tile - 1];
  }
  sums[tile] = sum;
  if (fault == 1) {
    ptx::st_relaxed(flag + tile, 1);
  } else {
    ptx::st_release(flag + tile, 1);
  }
}

void chain(int fault) {
  DeviceArray<int> sums(8);
  DeviceArray<unsigned> flag(8), ticket(1);
  launch("chain", chain_kernel, 8, 32, 0, nullptr, sums.data(), flag.data(), ticket.data(), fault);
}

// ---- copies beside the thread

__global__ void stage_kernel(const float* x, float* y, int fault) {
  float (*stage)[32] = dynamic_shared<float[32]>();
  const int t = int(threadIdx.x);
  for (int i = 0; i < 3; ++i) {
    if (t < 8) ptx::cp_async_16(&stage[i % 2][4 * t], x + 32 * i + 4 * t + (fault == 4));
    ptx::cp_async_commit();
    if (fault != 1) ptx::cp_async_wait<0>();
    if (fault != 2) __syncthreads();  // all of the row is here
    y[32 * i + t] = stage[i % 2][t];
    if (fault == 3) stage[(i + 1) % 2][31 - t] = 0;  // while others may still read the row before
  }
}

void stage(int fault) {
  DeviceArray<float> x(128, 1), y(96);
  launch("stage", stage_kernel, 1, 32, 2 * 32 * sizeof(float), nullptr, x.data(), y.data(), fault);
}

// ---- mbarriers and products of a warpgroup

struct Ring {
  uint64_t full, free;
  SharedArray<int, 32> slot;
};

template <class T>
__global__ void ring_kernel(T* y, int fault) {
  if constexpr (ptx::kHopper) {
    auto& s = block_shared<Ring>();
    const int l = int(threadIdx.x) % 32;
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&s.full, fault == 1 ? 33 : 32), ptx::mbarrier_init(&s.free, 1);
    }
    if (fault != 2) __syncthreads();  // the barriers are there
    if (threadIdx.x < 32) {
      for (int i = 0; i < 3; ++i) {
        if (fault != 3) ptx::mbarrier_wait(&s.free, unsigned(i + 1) % 2);
        s.slot[l] = i;
        ptx::mbarrier_arrive(&s.full);
      }
      return;
    }
    for (int i = 0; i < 3; ++i) {
      if (fault != 4) ptx::mbarrier_wait(&s.full, unsigned(i) % 2);
      y[l] = s.slot[31 - l];
      if (fault != 5) __syncwarp();  // all lanes have read
      if (l == 0) ptx::mbarrier_arrive(&s.free);
    }
  }
}

void ring(int fault) {
  DeviceArray<int> y(32);
  launch("ring", ring_kernel<int>, 1, 64, 0, nullptr, y.data(), fault);
}

struct Operand {
  alignas(1024) SharedArray<uint4, 512> piece;
};

// Ones times ones, twice; the second time they are written anew.
template <class T>
__global__ void warpgroup_product_kernel(T* y, int fault) {
  if constexpr (ptx::kHopper) {
    auto& s = *dynamic_shared<Operand>();
    const int t = int(threadIdx.x);
    const uint32_t ones = ptx::pack_bf16(1, 1);
    float d[32];
    for (float& x : d) x = 0;
    uint32_t a[4] = {ones, ones, ones, ones};
    for (int i = 0; i < 2; ++i) {
      for (int j = t; j < 512; j += 128) s.piece[j] = {ones, ones, ones, ones};
      if (fault != 1) ptx::fence_proxy_async();
      if (fault != 2) __syncthreads();  // the operand is there
      if (fault != 3) ptx::wgmma_fence(d, a);
      if (fault != 8 || t < 96) {
        ptx::wgmma_64x64x16(d, a, ptx::wgmma_operand(&s, fault == 9 && t >= 96 ? 128 : 0));
      }
      ptx::wgmma_commit();
      if (fault == 4 && i == 0) s.piece[t] = {};
      if (fault == 5) {
        ptx::wgmma_wait<1>();
      } else if (fault == 6) {
        ptx::wgmma_wait<1>(d);
      } else {
        ptx::wgmma_wait<0>(d);
      }
      if (fault != 7) __syncthreads();  // the operand has been read
      if (fault == 3) ptx::wgmma_fence(a);
    }
    y[t] = d[t % 32];
  }
}

void warpgroup_product(int fault) {
  DeviceArray<float> y(128);
  launch("warpgroup product", warpgroup_product_kernel<float>, 1, 128, sizeof(Operand), nullptr,
         y.data(), fault);
  for (float x : y.values()) expect(x == 32, "a product of ones");
}

// Of 168 registers at launch, two warpgroups take what the third has given back, or more.
template <class T>
__global__ void __launch_bounds__(384, 1) registers_kernel(T* y, int fault) {
  if constexpr (ptx::kHopper) {
    const int t = int(threadIdx.x);
    if (t >= 128) {
      ptx::have_more_registers<232>();
    } else if (fault == 1) {
      ptx::have_less_registers<48>();
    } else if (fault != 2 || t >= 32) {
      ptx::have_less_registers<40>();
    }
    y[t] = t;
  }
}

void registers(int fault) {
  DeviceArray<int> y(384);
  launch("registers", registers_kernel<int>, 1, 384, 0, nullptr, y.data(), fault);
}

// ---- the host

void host(int fault) {
  DeviceArray<int> sum(1);
  launch("host", add_kernel, 1, fault == 1 ? 2048 : 32, fault == 2 ? 300 * 1024 : 0, nullptr,
         sum.data(), 0);
  if (fault == 3) *sum.data() = 0;
}

const Case cases[] = {
    {"reverse", reverse},
    {"divergent", divergent},
    {"warp exchange", warp_exchange},
    {"hand over", hand_over},
    {"warp sum", warp_sum},
    {"bounds", bounds},
    {"spaces", spaces},
    {"add", add},
    {"last block", last_block, 3},
    {"chain", chain},
    {"stage", stage},
    {"ring", ring},
    {"warpgroup product", warpgroup_product},
    {"registers", registers},
    {"host", host},
};

}  // namespace
}  // namespace statescan::tests

STATESCAN_CASES(faults, statescan::tests::cases)
