// Small kernels whose results follow from the CUDA manual: every intrinsic and PTX function that the
// emulator has. They run on the emulator in every test run, and on a GPU where there is one
// (conformance_main.cpp), which shows that both mean the same.
#include <cmath>
#include <iterator>
#include <string>

#include "common/half.h"
#include "common/ptx90.cuh"
#include "common/shared.cuh"
#include "device_memory.h"

namespace statescan::tests {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- shuffles and votes

__global__ void shuffles_kernel(int* out) {  // (8, lane)
  const int l = int(threadIdx.x);
  out[0 * 32 + l] = __shfl_sync(kAll, 3 * l, l + 5);
  out[1 * 32 + l] = __shfl_sync(kAll, 3 * l, 9, 8);
  out[2 * 32 + l] = __shfl_up_sync(kAll, l, 3);
  out[3 * 32 + l] = __shfl_up_sync(kAll, l, 3, 16);
  out[4 * 32 + l] = __shfl_down_sync(kAll, l, 3);
  out[5 * 32 + l] = __shfl_down_sync(kAll, l, 3, 8);
  out[6 * 32 + l] = __shfl_xor_sync(kAll, l, 5);
  out[7 * 32 + l] = __shfl_xor_sync(kAll, l, 12, 8);
}

void shuffles(int) {
  DeviceArray<int> out(8 * 32, -1);
  launch("shuffles", shuffles_kernel, 1, 32, 0, nullptr, out.data());
  const std::vector<int> got = out.values();
  for (int l = 0; l < 32; ++l) {
    const int crossed = (l ^ 12) < l / 8 * 8 + 8 ? l ^ 12 : l;
    const int want[] = {3 * ((l + 5) % 32),
                        3 * (l / 8 * 8 + 1),
                        l >= 3 ? l - 3 : l,
                        l % 16 >= 3 ? l - 3 : l,
                        l + 3 < 32 ? l + 3 : l,
                        l % 8 < 5 ? l + 3 : l,
                        l ^ 5,
                        crossed};
    for (int i = 0; i < 8; ++i) expect(got[i * 32 + l] == want[i], "a shuffle");
  }
}

// The halves of a warp shuffle among themselves, in different places, then meet.
__global__ void halves_kernel(int* out) {
  const int l = int(threadIdx.x);
  int sum = l;
  if (l < 16) {
    for (int s = 8; s > 0; s /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, s, 16);
  } else {
    for (int s = 1; s < 16; s *= 2) sum += __shfl_xor_sync(0xffff0000u, sum, s, 16);
    sum += __popc(__ballot_sync(0xffff0000u, l & 1));
  }
  __syncwarp();
  out[l] = sum;
}

void halves(int) {
  DeviceArray<int> out(32, -1);
  launch("halves", halves_kernel, 1, 32, 0, nullptr, out.data());
  const std::vector<int> got = out.values();
  for (int l = 0; l < 32; ++l) expect(got[l] == (l < 16 ? 120 : 376 + 8), "sum of half a warp");
}

__global__ void votes_kernel(unsigned* out) {  // (3, lane)
  const int l = int(threadIdx.x);
  out[l] = __ballot_sync(kAll, l % 3 == 0);
  out[32 + l] = unsigned(__any_sync(kAll, l == 40) + 2 * __any_sync(kAll, l == 4) +
                         4 * __all_sync(kAll, l < 32) + 8 * __all_sync(kAll, l < 31));
  out[64 + l] = __match_any_sync(kAll, l % 5);
}

void votes(int) {
  DeviceArray<unsigned> out(96);
  launch("votes", votes_kernel, 1, 32, 0, nullptr, out.data());
  const std::vector<unsigned> got = out.values();
  for (int l = 0; l < 32; ++l) {
    unsigned thirds = 0, equal = 0;
    for (int i = 0; i < 32; ++i) thirds |= unsigned(i % 3 == 0) << i;
    for (int i = 0; i < 32; ++i) equal |= unsigned(i % 5 == l % 5) << i;
    expect(got[l] == thirds, "ballot");
    expect(got[32 + l] == 2 + 4, "any, all");
    expect(got[64 + l] == equal, "match");
  }
}

__global__ void counts_kernel(int* out) {
  const int t = int(threadIdx.x);
  const int count = __syncthreads_count(t % 3 == 0);
  out[t] =
      count + 1000 * (__syncthreads_and(t < 96) != 0) + 2000 * (__syncthreads_or(t == 95) != 0);
}

void counts(int) {
  DeviceArray<int> out(96);
  launch("counts", counts_kernel, 1, 96, 0, nullptr, out.data());
  for (int count : out.values()) expect(count == 32 + 1000 + 2000, "counting barriers");
}

// ---- scalar functions

__global__ void scalars_kernel(const float* x, float* y, uint32_t* pair) {
  const int i = ptx::opaque(int(threadIdx.x));
  y[2 * i] = ptx::ex2(x[i]);
  y[2 * i + 1] = ptx::rcp(x[i]);
  pair[2 * i] = ptx::pack_bf16(x[i], -x[i]);
  pair[64 + 2 * i] = ptx::pair_halves(0, 0x40003 + i, 0x50007 + 2 * i);
  pair[64 + 2 * i + 1] = ptx::pair_halves(1, 0x40003 + (i << 16), 0x50007);
  pair[2 * i + 1] = ptx::pack_f16(x[i], ptx::f16_to_float(uint16_t(0x3c00 + ptx::lane())));
}

void scalars(int) {
  std::vector<float> values(32);
  for (int i = 0; i < 32; ++i) values[i] = (i - 15.5f) * 1.37f;
  DeviceArray<float> x(values), y(64);
  DeviceArray<uint32_t> pair(128);
  launch("scalars", scalars_kernel, 1, 32, 0, nullptr, x.data(), y.data(), pair.data());
  const std::vector<float> got = y.values();
  const std::vector<uint32_t> pairs = pair.values();
  for (int i = 0; i < 32; ++i) {
    const float v = values[i];
    expect(std::fabs(got[2 * i] / std::exp2(double(v)) - 1) < 3e-7, "ex2");
    expect(std::fabs(got[2 * i + 1] * double(v) - 1) < 3e-7, "rcp");
    const uint32_t low = from_float<BFloat16>(v).bits, high = from_float<BFloat16>(-v).bits;
    expect(pairs[2 * i] == (low | high << 16), "pack_bf16");
    expect(pairs[64 + 2 * i] == 0x70003u + (unsigned(i) << 17) + unsigned(i), "low halves");
    expect(pairs[64 + 2 * i + 1] == 0x50004u + unsigned(i), "high halves");
    expect(pairs[2 * i + 1] == (from_float<Half>(v).bits | uint32_t(0x3c00 + i) << 16), "f16");
  }
}

// ---- vectors in memory

__global__ void vectors_kernel(const uint4* x, uint4* y, uint2* half) {
  const int i = int(threadIdx.x);
  ptx::prefetch(x + 31 - i);
  const uint4 v = ptx::load_streaming(x + i);
  ptx::store(y + i, v);
  ptx::store_streaming(y + 32 + i, v);
  ptx::store(half + i, uint2{v.z, v.w});
}

void vectors(int) {
  std::vector<uint4> values(32);
  for (unsigned i = 0; i < 32; ++i) values[i] = {4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3};
  DeviceArray<uint4> x(values), y(64);
  DeviceArray<uint2> half(32);
  launch("vectors", vectors_kernel, 1, 32, 0, nullptr, x.data(), y.data(), half.data());
  const std::vector<uint4> got = y.values();
  const std::vector<uint2> halves = half.values();
  for (unsigned i = 0; i < 64; ++i) {
    const unsigned first = i % 32 * 4;
    expect(got[i].x == first && got[i].y == first + 1, "the first half of a vector");
    expect(got[i].z == first + 2 && got[i].w == first + 3, "the second half of a vector");
    if (i < 32) expect(halves[i].x == first + 2 && halves[i].y == first + 3, "8 bytes");
  }
}

// ---- tensor cores

// One 16 x 8 product; a (16, k) and b (8, k) row by row.
__global__ void product_kernel(const uint32_t* a, const uint32_t* b, float* d, int kind) {
  const int g = int(threadIdx.x) / 4, m = int(threadIdx.x) % 4;
  float sum[4] = {1, 2, 3, 4};
  uint32_t fragment_a[4], fragment_b[2];
  const int pitch = 8;  // words of a row: 16 halves, or 8 floats
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[(g + i % 2 * 8) * pitch + m + i / 2 * 4];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[g * pitch + m + i * 4];
  if (kind == 0) ptx::mma_16x8x16_bf16(sum, fragment_a, fragment_b);
  if (kind == 1) ptx::mma_16x8x16_f16(sum, fragment_a, fragment_b);
  if (kind == 2) {
    for (uint32_t& x : fragment_a) x = ptx::to_tf32(__uint_as_float(x));
    for (uint32_t& x : fragment_b) x = ptx::to_tf32(__uint_as_float(x));
    ptx::mma_16x8x8_tf32(sum, fragment_a, fragment_b);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * m + i % 2] = sum[i];
}

void product(int kind) {
  const int depth = kind == 2 ? 8 : 16;
  auto value = [&](int row, int k) { return float((row * 7 + k * 3) % 13 - 6) / 4; };  // exact
  std::vector<uint32_t> a(16 * 8), b(8 * 8);
  auto put = [&](std::vector<uint32_t>& words, int row, int k, float x) {
    if (kind == 2) {
      words[row * 8 + k] = float_to_bits(x);
    } else {
      const uint32_t bits = kind == 0 ? from_float<BFloat16>(x).bits : from_float<Half>(x).bits;
      words[row * 8 + k / 2] |= bits << 16 * (k % 2);
    }
  };
  for (int k = 0; k < depth; ++k) {
    for (int row = 0; row < 16; ++row) put(a, row, k, value(row, k));
    for (int row = 0; row < 8; ++row) put(b, row, k, value(row + 20, k));
  }
  DeviceArray<uint32_t> a_device(a), b_device(b);
  DeviceArray<float> d(16 * 8);
  launch("product", product_kernel, 1, 32, 0, nullptr, a_device.data(), b_device.data(), d.data(),
         kind);
  const std::vector<float> got = d.values();
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float want = float(1 + column % 2 + row / 8 * 2);
      for (int k = 0; k < depth; ++k) want += value(row, k) * value(column + 20, k);
      expect(std::fabs(got[row * 8 + column] - want) < 1e-5, "a product of matrices");
    }
  }
}

struct FourMatrices {
  uint16_t element[4][8][8];
};

__global__ void matrices_kernel(uint32_t* out, int transposed) {
  auto& s = block_shared<FourMatrices>();
  const int l = int(threadIdx.x);
  for (int i = l; i < 256; i += 32) s.element[i / 64][i / 8 % 8][i % 8] = uint16_t(i);
  __syncwarp();
  uint32_t r[4];
  if (transposed) {
    ptx::ldmatrix_x4_trans(r, s.element[l / 8][l % 8]);
  } else {
    ptx::ldmatrix_x4(r, s.element[l / 8][l % 8]);
  }
  for (int i = 0; i < 4; ++i) out[i * 32 + l] = r[i];
}

void matrices(int) {
  for (int transposed : {0, 1}) {
    DeviceArray<uint32_t> out(128);
    launch("matrices", matrices_kernel, 1, 32, 0, nullptr, out.data(), transposed);
    const std::vector<uint32_t> got = out.values();
    for (int i = 0; i < 128; ++i) {
      const int matrix = i / 32, row = i % 32 / 4, column = i % 4 * 2;
      auto element = [&](int r, int c) {
        return uint32_t(matrix * 64 + (transposed ? c * 8 + r : r * 8 + c));
      };
      expect(got[i] == (element(row, column) | element(row, column + 1) << 16), "ldmatrix");
    }
  }
}

// ---- shared memory and barriers

struct WarpTile {
  float element[4][32][33];
};

// Each warp transposes a tile of its own; __syncwarp is all that orders it.
__global__ void transpose_kernel(const float* x, float* y) {
  auto& s = block_shared<WarpTile>();
  const int l = int(threadIdx.x) % 32, w = int(threadIdx.x) / 32;
  for (int i = 0; i < 32; ++i) s.element[w][i][l] = x[w * 1024 + i * 32 + l];
  __syncwarp();
  for (int i = 0; i < 32; ++i) y[w * 1024 + i * 32 + l] = s.element[w][l][i];
}

void transpose(int) {
  std::vector<float> values(4096);
  for (int i = 0; i < 4096; ++i) values[i] = float(i);
  DeviceArray<float> x(values), y(4096, -1);
  launch("transpose", transpose_kernel, 1, 128, 0, nullptr, x.data(), y.data());
  const std::vector<float> got = y.values();
  for (int i = 0; i < 4096; ++i) {
    expect(got[i] == values[i / 1024 * 1024 + i % 32 * 32 + i / 32 % 32], "a transposed tile");
  }
}

struct TwoSlots {
  int slot[2][64];
};

// Warp 2 produces, warps 0 and 1 consume; barriers 1, 2: a slot is full, 3, 4: it is free.
__global__ void pipeline_kernel(int* out, int rounds) {
  auto& s = block_shared<TwoSlots>();
  const int t = int(threadIdx.x);
  if (t >= 64) {
    for (int i = 0; i < rounds; ++i) {
      if (i >= 2) ptx::barrier_sync(3 + i % 2, 96);
      for (int j = t - 64; j < 64; j += 32) s.slot[i % 2][j] = i * 100 + j;
      ptx::barrier_arrive(1 + i % 2, 96);
    }
    return;
  }
  int sum = 0;
  for (int i = 0; i < rounds; ++i) {
    ptx::barrier_sync(1 + i % 2, 96);
    sum += s.slot[i % 2][63 - t];
    if (i + 2 < rounds) ptx::barrier_arrive(3 + i % 2, 96);
  }
  out[t] = sum;
}

void pipeline(int) {
  DeviceArray<int> out(64);
  launch("pipeline", pipeline_kernel, 1, 96, 0, nullptr, out.data(), 7);
  const std::vector<int> got = out.values();
  for (int t = 0; t < 64; ++t) expect(got[t] == 2100 + 7 * (63 - t), "what was consumed");
}

// y = x through two stages of dynamic shared memory; a row beyond the end is zero.
__global__ void staged_copy_kernel(const float* x, float* y, int rows, int whole) {
  float (*stage)[128] = dynamic_shared<float[128]>();
  const int t = int(threadIdx.x);
  auto load = [&](int row) {
    const int source_bytes = row < whole ? 16 : 0;
    ptx::cp_async_16(&stage[row % 2][4 * t], x + (row < whole ? row * 128 + 4 * t : 0),
                     source_bytes);
    ptx::cp_async_commit();
  };
  load(0);
  for (int row = 0; row < rows; ++row) {
    if (row + 1 < rows) {
      load(row + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // every thread's part of this row has arrived
    for (int i = 0; i < 4; ++i) y[row * 128 + i * 32 + t] = stage[row % 2][i * 32 + t];
    __syncthreads();  // it has been read
  }
}

void staged_copy(int) {
  std::vector<float> values(5 * 128);
  for (size_t i = 0; i < values.size(); ++i) values[i] = float(i) + 1;
  DeviceArray<float> x(values), y(6 * 128, -1);
  launch("staged copy", staged_copy_kernel, 1, 32, 2 * 128 * sizeof(float), nullptr, x.data(),
         y.data(), 6, 5);
  const std::vector<float> got = y.values();
  for (size_t i = 0; i < got.size(); ++i) {
    expect(got[i] == (i < values.size() ? values[i] : 0), "what cp.async copied");
  }
}

struct RaggedRows {
  alignas(16) SharedArray<uint16_t, 9 * 8> element;
};

// Row l has its first l of 8 elements; the rest of what was there becomes zero.
__global__ void ragged_copy_kernel(const uint16_t* x, uint16_t* y) {
  auto& s = block_shared<RaggedRows>();
  const int l = int(threadIdx.x);
  for (int i = l; i < 9 * 8; i += 32) s.element[i] = 0xffff;
  __syncwarp();
  if (l < 9) ptx::cp_async_16(&s.element[8 * l], x + 8 * l, 2 * l);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = l; i < 9 * 8; i += 32) y[i] = s.element[i];
}

void ragged_copy(int) {
  std::vector<uint16_t> values(9 * 8);
  for (int i = 0; i < 9 * 8; ++i) values[i] = uint16_t(i + 1);
  DeviceArray<uint16_t> x(values), y(9 * 8);
  launch("ragged copy", ragged_copy_kernel, 1, 32, 0, nullptr, x.data(), y.data());
  const std::vector<uint16_t> got = y.values();
  for (int i = 0; i < 9 * 8; ++i) {
    expect(got[i] == (i % 8 < i / 8 ? i + 1 : 0), "a part of what cp.async could copy");
  }
}

struct Ring {
  uint64_t full[2], free[2];
  alignas(16) SharedArray<int, 2 * 64> slot;
};

// Warp 2 copies, warps 0 and 1 add up: a slot is full or free when the phase of its mbarrier is over.
__global__ void ring_kernel(const int* x, int* out, int rounds) {
  auto& s = block_shared<Ring>();
  const int t = int(threadIdx.x);
  if (t < 2) ptx::mbarrier_init(&s.full[t], 32), ptx::mbarrier_init(&s.free[t], 2);
  __syncthreads();  // the barriers are there
  if (t >= 64) {
    for (int i = 0; i < rounds; ++i) {
      ptx::mbarrier_wait(&s.free[i % 2], unsigned(i / 2 + 1) % 2);
      if (t < 80) ptx::cp_async_16(&s.slot[i % 2 * 64 + (t - 64) * 4], x + i * 64 + (t - 64) * 4);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      ptx::mbarrier_arrive(&s.full[i % 2]);
    }
    return;
  }
  int sum = 0;
  for (int i = 0; i < rounds; ++i) {
    ptx::mbarrier_wait(&s.full[i % 2], unsigned(i / 2) % 2);
    sum += s.slot[i % 2 * 64 + 63 - t];
    __syncwarp();  // the slot has been read
    if (t % 32 == 0) ptx::mbarrier_arrive(&s.free[i % 2]);
  }
  out[t] = sum;
}

void ring(int) {
  std::vector<int> values(7 * 64);
  for (int i = 0; i < 7 * 64; ++i) values[i] = i / 64 * 100 + i % 64;
  DeviceArray<int> x(values), out(64);
  launch("ring", ring_kernel, 1, 96, 0, nullptr, x.data(), out.data(), 7);
  const std::vector<int> got = out.values();
  for (int t = 0; t < 64; ++t) expect(got[t] == 2100 + 7 * (63 - t), "what came by the ring");
}

// ---- between blocks

// All blocks meet after each round; all of them have to be resident.
__global__ void grid_barrier_kernel(int* data, unsigned* arrived, int rounds) {
  const int blocks = int(gridDim.x), b = int(blockIdx.x), t = int(threadIdx.x);
  for (int r = 0; r < rounds; ++r) {
    const int* from = data + r % 2 * blocks * 64;
    data[(r + 1) % 2 * blocks * 64 + b * 64 + t] = from[(b + 1) % blocks * 64 + (t + 1) % 64] + 1;
    __syncthreads();
    if (t == 0) {
      __threadfence();
      atomicAdd(arrived, 1u);
      while (ptx::ld_acquire(arrived) < unsigned(blocks * (r + 1))) {
      }
    }
    __syncthreads();
  }
}

void grid_barrier(int) {
  constexpr int kBlocks = 12, kRounds = 3;
  std::vector<int> values(2 * kBlocks * 64);
  for (int i = 0; i < kBlocks * 64; ++i) values[i] = 1000 * (i / 64) + i % 64;
  DeviceArray<int> data(values);
  DeviceArray<unsigned> arrived(1);
  launch("grid barrier", grid_barrier_kernel, kBlocks, 64, 0, nullptr, data.data(), arrived.data(),
         kRounds);
  const std::vector<int> got = data.values();
  for (int i = 0; i < kBlocks * 64; ++i) {
    const int b = (i / 64 + kRounds) % kBlocks, t = (i % 64 + kRounds) % 64;
    expect(got[kRounds % 2 * kBlocks * 64 + i] == 1000 * b + t + kRounds, "after a grid barrier");
  }
}

struct LastFlag {
  int last;
};

// Whichever block comes last adds up what all of them have left.
__global__ void last_block_kernel(const int* x, int* partial, unsigned* ticket, int* out) {
  auto& s = block_shared<LastFlag>();
  int sum = x[blockIdx.x * 32 + threadIdx.x];
  for (int k = 16; k > 0; k /= 2) sum += __shfl_down_sync(kAll, sum, k);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    s.last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();  // before the barrier: the other threads learn from this one
  }
  __syncthreads();
  if (!s.last) return;
  int total = 0;
  for (int i = int(threadIdx.x); i < int(gridDim.x); i += 32) total += partial[i];
  for (int k = 16; k > 0; k /= 2) total += __shfl_down_sync(kAll, total, k);
  if (threadIdx.x == 0) *out = total;
}

void last_block(int) {
  std::vector<int> values(40 * 32);
  int want = 0;
  for (size_t i = 0; i < values.size(); ++i) want += values[i] = int(i * 37 % 101);
  DeviceArray<int> x(values), partial(40), out(1);
  DeviceArray<unsigned> ticket(1);
  launch("last block", last_block_kernel, 40, 32, 0, nullptr, x.data(), partial.data(),
         ticket.data(), out.data());
  expect(out.values()[0] == want, "the sum of all blocks");
}

// Block i hands the sum so far to block i + 1; tickets make sure that whom it waits for has begun.
__global__ void chain_kernel(const int* x, int* sums, unsigned* flag, unsigned* ticket) {
  if (threadIdx.x != 0) return;
  const int tile = int(atomicAdd(ticket, 1u));
  int sum = x[tile];
  if (tile > 0) {
    while (ptx::ld_acquire(flag + tile - 1) == 0) {
    }
    sum += sums[tile - 1];
  }
  sums[tile] = sum;
  ptx::st_release(flag + tile, 1);
}

void chain(int) {
  std::vector<int> values(30);
  for (int i = 0; i < 30; ++i) values[i] = i + 1;
  DeviceArray<int> x(values), sums(30);
  DeviceArray<unsigned> flag(30), ticket(1);
  launch("chain", chain_kernel, 30, 32, 0, nullptr, x.data(), sums.data(), flag.data(),
         ticket.data());
  const std::vector<int> got = sums.values();
  for (int i = 0; i < 30; ++i) expect(got[i] == (i + 1) * (i + 2) / 2, "a sum along the chain");
}

struct Bins {
  SharedArray<int, 16> count;
};

__global__ void histogram_kernel(const int* x, int n, int* out, float* halves) {
  auto& s = block_shared<Bins>();
  const int t = int(threadIdx.x);
  if (t < 16) s.count[t] = 0;
  __syncthreads();  // the bins are empty
  for (int i = int(blockIdx.x) * 64 + t; i < n; i += int(gridDim.x) * 64) {
    atomicAdd(&s.count[x[i] & 15], 1);
    atomicAdd(halves, 0.5f);
  }
  __syncthreads();  // they are full
  if (t < 16) atomicAdd(&out[t], s.count[t]);
}

void histogram(int) {
  std::vector<int> values(1000), want(16);
  for (int i = 0; i < 1000; ++i) ++want[(values[i] = i * i % 31) & 15];
  DeviceArray<int> x(values), out(16);
  DeviceArray<float> halves(1);
  launch("histogram", histogram_kernel, 3, 64, 0, nullptr, x.data(), 1000, out.data(),
         halves.data());
  expect(out.values() == want, "a histogram");
  expect(halves.values()[0] == 500, "atomics on floats");
}

// Numbers find places of their own, each once.
__global__ void table_kernel(const int* x, int* times, int* entries) {
  auto& s = block_shared<Bins>();
  const int t = int(threadIdx.x);
  if (t < 16) s.count[t] = -1;
  __syncthreads();  // the table is empty
  int at = 13, before;
  while ((before = atomicCAS(&s.count[at % 16], -1, x[t])) != -1 && before != x[t]) ++at;
  if (before == -1) atomicAdd(&times[x[t]], 1);
  __syncthreads();  // all are there
  if (t < 16) entries[t] = s.count[t];
}

void table(int) {
  std::vector<int> values(64), want(16);
  for (int i = 0; i < 64; ++i) want[values[i] = i * i % 12] = 1;
  DeviceArray<int> x(values), times(16), entries(16);
  launch("table", table_kernel, 1, 64, 0, nullptr, x.data(), times.data(), entries.data());
  expect(times.values() == want, "each number finds one place");
  for (const int entry : entries.values()) want[entry < 0 ? 15 : entry] = 0;
  expect(want == std::vector<int>(16), "all numbers are there");
}

// ---- Hopper: on another GPU these kernels are empty, and so are their cases

template <class T>
__global__ void is_hopper_kernel(T* out) {
  *out = ptx::kHopper;
}

bool is_hopper() {
  DeviceArray<int> out(1);
  launch("is hopper", is_hopper_kernel<int>, 1, 1, 0, nullptr, out.data());
  return out.values()[0] != 0;
}

struct StoredMatrices {
  alignas(16) uint16_t element[4][8][8];
};

template <class T>
__global__ void stored_matrices_kernel(T* out) {
  if constexpr (ptx::kHopper) {
    auto& s = block_shared<StoredMatrices>();
    const int l = int(threadIdx.x), row = l / 4, column = l % 4 * 2;
    uint32_t r[4];
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned first = i * 64 + unsigned(row * 8 + column);
      r[i] = first | (first + 1) << 16;
    }
    ptx::stmatrix_x4_trans(s.element[l / 8][l % 8], r);
    __syncwarp();
    for (int i = l; i < 256; i += 32) out[i] = s.element[i / 64][i / 8 % 8][i % 8];
  }
}

void stored_matrices(int) {
  if (!is_hopper()) return;
  DeviceArray<int> out(256);
  launch("stored matrices", stored_matrices_kernel<int>, 1, 32, 0, nullptr, out.data());
  const std::vector<int> got = out.values();
  for (int i = 0; i < 256; ++i) {
    expect(got[i] == i / 64 * 64 + i % 8 * 8 + i / 8 % 8, "a stored transpose");
  }
}

// 64 x 64 of 16 bits in rows of 128 bytes, swizzled.
struct Operand {
  alignas(1024) SharedArray<uint16_t, 64 * 64> element;

  __device__ __forceinline__ uint16_t& at(int row, int column) {
    return element[row * 64 + (column / 8 ^ row % 8) * 8 + column % 8];
  }
};
struct Operands {
  Operand a[2], b[2];  // of each warpgroup
};

enum Form { kRows, kDepthFirst, kRegisters };

// d (64, 64) = a b^T or, with a in registers, d + a b^T; a, b (2, 64, 64), [row][depth].
template <class T>
__global__ void __launch_bounds__(256, 2)
    warpgroup_product_kernel(const uint16_t* a, const uint16_t* b, T* out, int form) {
  if constexpr (ptx::kHopper) {
    auto& s = *dynamic_shared<Operands>();
    const int group = int(threadIdx.x) / 128, t = int(threadIdx.x) % 128, l = t % 32;
    a += group * 4096, b += group * 4096, out += group * 4096;
    group == 0 ? ptx::have_less_registers<96>() : ptx::have_more_registers<160>();
    for (int i = t; i < 4096; i += 128) {
      s.a[group].at(i / 64, i % 64) = a[i];
      (form == kRows ? s.b[group].at(i / 64, i % 64) : s.b[group].at(i % 64, i / 64)) = b[i];
    }
    ptx::fence_proxy_async();
    ptx::barrier_sync(1 + group, 128);  // all of the operands are there, and known to be
    const int row = t / 32 * 16 + l / 4;
    float d[32];
    uint32_t left[4][4];
    for (int i = 0; i < 32; ++i) d[i] = T(i % 4 + 1);
    for (int i = 0; i < 16; ++i) {
      const uint16_t* pair = a + (row + i % 2 * 8) * 64 + i / 4 * 16 + l % 4 * 2 + i % 4 / 2 * 8;
      left[i / 4][i % 4] = pair[0] | uint32_t(pair[1]) << 16;
    }
    ptx::wgmma_fence(d, left);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t rows = ptx::wgmma_operand(&s.a[group], 2 * k);
      const uint64_t by_row = ptx::wgmma_operand(&s.b[group], 2 * k);
      const uint64_t by_depth = ptx::wgmma_operand(&s.b[group], 128 * k);
      if (form == kRows) ptx::wgmma_64x64x16<false>(d, rows, by_row, k > 0);
      if (form == kDepthFirst) ptx::wgmma_64x64x16<true>(d, rows, by_depth, k > 0);
      if (form == kRegisters) ptx::wgmma_64x64x16(d, left[k], by_depth);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    for (int i = 0; i < 32; ++i) {
      out[(row + i % 4 / 2 * 8) * 64 + i / 4 * 8 + l % 4 * 2 + i % 2] = d[i];
    }
  }
}

void warpgroup_product(int form) {
  if (!is_hopper()) return;
  auto value = [](int group, int row, int k) {
    return float((group * 5 + row * 7 + k * 3 + row * k % 5) % 13 - 6) / 4;  // exact
  };
  std::vector<uint16_t> a(2 * 4096), b(2 * 4096);
  for (int i = 0; i < 2 * 4096; ++i) {
    a[i] = from_float<BFloat16>(value(i / 4096, i / 64 % 64, i % 64)).bits;
    b[i] = from_float<BFloat16>(value(i / 4096, i / 64 % 64 + 100, i % 64)).bits;
  }
  DeviceArray<uint16_t> a_device(a), b_device(b);
  DeviceArray<float> d(2 * 4096);
  launch("warpgroup product", warpgroup_product_kernel<float>, 1, 256, sizeof(Operands), nullptr,
         a_device.data(), b_device.data(), d.data(), form);
  const std::vector<float> got = d.values();
  for (int i = 0; i < 2 * 4096; ++i) {
    const int group = i / 4096, row = i / 64 % 64, column = i % 64;
    float want = form == kRegisters ? float(1 + column % 2 + row % 16 / 8 * 2) : 0;
    for (int k = 0; k < 64; ++k) want += value(group, row, k) * value(group, column + 100, k);
    expect(std::fabs(got[i] - want) < 1e-4, "a product of a warpgroup");
  }
}

const Case cases[] = {
    {"shuffles", shuffles},
    {"halves of a warp", halves},
    {"votes", votes},
    {"counting barriers", counts},
    {"scalar functions", scalars},
    {"vectors in memory", vectors},
    {"product bf16", [](int) { product(0); }},
    {"product f16", [](int) { product(1); }},
    {"product tf32", [](int) { product(2); }},
    {"ldmatrix", matrices},
    {"transpose in a warp", transpose},
    {"pipeline of warps", pipeline},
    {"staged copy", staged_copy},
    {"ragged copy", ragged_copy},
    {"grid barrier", grid_barrier, 12},
    {"last block", last_block, 5},
    {"chain of blocks", chain, 3},
    {"histogram", histogram},
    {"table", table},
    {"ring of mbarriers", ring},
    {"stmatrix", stored_matrices},
    {"warpgroup product, rows", [](int) { warpgroup_product(kRows); }},
    {"warpgroup product, depth first", [](int) { warpgroup_product(kDepthFirst); }},
    {"warpgroup product, registers", [](int) { warpgroup_product(kRegisters); }},
};

}  // namespace
}  // namespace statescan::tests

STATESCAN_CASES(conformance, statescan::tests::cases)
