// What a GPU does when nothing but one thing is asked of it: the rates that the floors of docs/
// rest on.
//
//   nvcc -std=c++20 -O3 -arch=native -Icsrc -Itests/simt bench/first_measurements.cu -o first && ./first
//
// prints one JSON object: bytes, exponentials and multiply-adds per second, times in seconds. The
// tests run it on the emulator, at sizes that mean nothing.
#include <cstdio>
#include <string>
#include <vector>

#include "common/ptx.cuh"
#include "common/shared.cuh"
#include "device_memory.h"

namespace statescan::bench {
namespace {

using tests::DeviceArray;

constexpr int kThreads = 256;

// Seconds of a call, the shortest of some.
template <class F>
double seconds_of(F&& call) {
#if defined(STATESCAN_SIMT)
  call();
  return 1e-3;
#else
  using tests::check;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin)), check(cudaEventCreate(&end));
  float best = 0;
  for (int i = 0; i < 10; ++i) {
    float ms = 0;
    check(cudaEventRecord(begin));
    call();
    check(cudaEventRecord(end)), check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i == 1 || (i > 1 && ms < best)) best = ms;  // the first one warms up
  }
  check(cudaEventDestroy(begin)), check(cudaEventDestroy(end));
  return best * 1e-3;
#endif
}

struct Sizes {
  int blocks;         // as many as fill the GPU
  int64_t far, near;  // packs of 16 bytes: beyond all caches, within the second-level cache
  int rounds, launches;
};

Sizes sizes(bool tiny) {
  if (tiny) return {2, 2048, 1024, 4, 2};
  return {132 * 8, int64_t(1) << 26, int64_t(1) << 20, 4096, 1000};
}

// ---- memory

__global__ __launch_bounds__(kThreads) void copy_kernel(const uint4* from, uint4* to,
                                                        int64_t packs) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
#pragma unroll 4
  for (int64_t i = first; i < packs; i += stride) to[i] = from[i];
}

// Everything once per round, each thread other packs every round: no first-level cache has them.
__global__ __launch_bounds__(kThreads) void read_kernel(const uint4* from, uint32_t* out,
                                                        int64_t packs, int rounds) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  uint32_t sum = 0;
  for (int r = 0; r < rounds; ++r) {
    const int64_t first = (int64_t(blockIdx.x + r) % gridDim.x) * kThreads + threadIdx.x;
#pragma unroll 8
    for (int64_t i = first; i < packs; i += stride) {
      const uint4 v = from[i];
      sum += v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  if (sum == 1) out[threadIdx.x] = sum;  // never: the sums of zeros
}

// Each load waits for the one before: next[i] is where to go from i.
__global__ void chase_kernel(const int* next, int* out, int first, int rounds) {
  int i = first;
  for (int r = 0; r < rounds; ++r) i = next[i];
  *out = i;
}

struct SharedPacks {
  SharedArray<uint4, kThreads> pack;
};

__global__ __launch_bounds__(kThreads) void shared_kernel(uint32_t* out, int rounds) {
  auto& shared = block_shared<SharedPacks>();
  shared.pack[int(threadIdx.x)] = {0, 0, 0, 0};
  __syncthreads();  // all packs are there
  uint32_t sum = 0;
  for (int r = 0; r < rounds; ++r) {
    const uint4 v = shared.pack[int(threadIdx.x + r + sum) % kThreads];
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 1) out[threadIdx.x] = sum;
}

// ---- arithmetic

// In each round a thread has kExps exponentials and kFmas multiply-adds, of eight chains.
template <int kExps, int kFmas>
__global__ __launch_bounds__(kThreads) void arithmetic_kernel(float* out, int rounds, float a) {
  constexpr int kChains = 8;
  float e[kChains], f[kChains];
  for (int i = 0; i < kChains; ++i) e[i] = -float(i), f[i] = float(threadIdx.x + i);
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int i = 0; i < kExps; ++i) e[i % kChains] = ptx::ex2(-e[i % kChains]);
#pragma unroll
    for (int i = 0; i < kFmas; ++i) f[i % kChains] = a * f[i % kChains] + a;
  }
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += e[i] + f[i];
  if (sum == -1.5f) out[threadIdx.x] = sum;
}

__global__ void empty_kernel() {}

// ---- what is measured

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), int blocks, int threads, const Arguments&... arguments) {
  launch("first measurements", kernel, blocks, threads, 0, cudaStream_t{}, arguments...);
}

double copy_rate(const Sizes& n, const uint4* from, uint4* to) {
  const double time = seconds_of([&] { start(copy_kernel, n.blocks, kThreads, from, to, n.far); });
  return 2.0 * double(n.far) * sizeof(uint4) / time;
}

double read_rate(const Sizes& n, const uint4* from, uint32_t* out, int64_t packs, int rounds) {
  const double time =
      seconds_of([&] { start(read_kernel, n.blocks, kThreads, from, out, packs, rounds); });
  return double(packs) * rounds * sizeof(uint4) / time;
}

// anew: every call goes where none has been, so that no cache helps.
double latency(const Sizes& n, int64_t bytes, bool anew) {
  // Steps of 4 KiB and a little, so that neither a line nor a page serves twice in a row.
  const int64_t count = bytes / int64_t(sizeof(int)), step = 1024 + 64;
  std::vector<int> next(count);
  for (int64_t i = 0; i < count; ++i) next[i] = int((i + step) % count);
  const DeviceArray<int> there(next);
  DeviceArray<int> out(1);
  int calls = 0;
  const double time = seconds_of([&] {
    const int first = anew ? 64 * calls++ : 0;
    start(chase_kernel, 1, 1, there.data(), out.data(), first, n.rounds);
  });
  return time / n.rounds;
}

double shared_rate(const Sizes& n, uint32_t* out) {
  const double time = seconds_of([&] { start(shared_kernel, n.blocks, kThreads, out, n.rounds); });
  return double(n.blocks) * kThreads * n.rounds * sizeof(uint4) / time;
}

template <int kExps, int kFmas>
double rounds_rate(const Sizes& n, float* out) {
  const double time = seconds_of(
      [&] { start(arithmetic_kernel<kExps, kFmas>, n.blocks, kThreads, out, n.rounds, 0.5f); });
  return double(n.blocks) * kThreads * n.rounds / time;
}

double launch_seconds(const Sizes& n) {
  const double time = seconds_of([&] {
    for (int i = 0; i < n.launches; ++i) start(empty_kernel, 1, 32);
  });
  return time / n.launches;
}

std::string measure(bool tiny) {
  const Sizes n = sizes(tiny);
  std::string json = "{";
  auto add = [&](const char* name, double value) {
    char text[96];
    std::snprintf(text, sizeof(text), "%s\"%s\": %.6g", json.size() > 1 ? ", " : "", name, value);
    json += text;
  };
  {
    const uint4 zero{0, 0, 0, 0};
    DeviceArray<uint4> from(size_t(n.far), zero), to(size_t(n.far), zero);
    DeviceArray<uint32_t> out(kThreads);
    add("copy", copy_rate(n, from.data(), to.data()));
    add("read", read_rate(n, from.data(), out.data(), n.far, 1));
    add("read_second_level_cache", read_rate(n, from.data(), out.data(), n.near, tiny ? 2 : 64));
    add("read_shared", shared_rate(n, out.data()));
  }
  DeviceArray<float> out(kThreads);
  add("exps", 8 * rounds_rate<8, 0>(n, out.data()));
  add("fmas", 32 * rounds_rate<0, 32>(n, out.data()));
  add("exps_beside_4_fmas_each", 8 * rounds_rate<8, 32>(n, out.data()));
  add("exps_beside_8_fmas_each", 8 * rounds_rate<8, 64>(n, out.data()));
  add("launch_s", launch_seconds(n));
  add("latency_second_level_cache_s", latency(n, tiny ? 1 << 14 : 8 << 20, false));
  add("latency_memory_s", latency(n, tiny ? 1 << 15 : 512 << 20, true));
  return json + "}";
}

}  // namespace
}  // namespace statescan::bench

extern "C" __attribute__((visibility("default"))) const char* first_measurements(int tiny) {
  static std::string json;
  json = statescan::bench::measure(tiny != 0);
  return json.c_str();
}

#if !defined(STATESCAN_SIMT)
int main() {
  try {
    std::puts(first_measurements(0));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
#endif
