#include "common/runs.cuh"

#include "common/lanes.cuh"
#include "common/launch.h"
#include "common/shared.cuh"

namespace statescan {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Partial {
  SharedArray<int64_t, kWarps> of_warp;
};

// The largest x of the block, for every thread.
__device__ __forceinline__ int64_t block_max(int64_t x, Partial& shared) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, x, lanes);
    x = other > x ? other : x;
  }
  __syncthreads();  // the call before has been read
  if (threadIdx.x % 32 == 0) shared.of_warp[int(threadIdx.x / 32)] = x;
  __syncthreads();  // every warp's part is written
  for (int i = 0; i < kWarps; ++i) {
    const int64_t other = shared.of_warp[i];
    x = other > x ? other : x;
  }
  return x;
}

// One block for each batch element, which is read twice: for the tokens at both ends that are not
// padding, then for where the runs that these belong to stop.
//
//   ids      -1 -1  4  4  7  4  4  4 -1
//   begin           ^                     first_end      ^ (the 7)
//   last_begin               ^            end                       ^ (after the last 4)
//
// Grid min(batch, 2^31 - 1), block kThreads, shared memory: a number for each warp.
__global__ __launch_bounds__(kThreads) void run_ends_kernel(const Sequences s) {
  Partial& shared = block_shared<Partial>();
  const int64_t n = s.seqlen;
  for (int64_t b = blockIdx.x; b < s.batch; b += gridDim.x) {
    int64_t from_end = 0, end = 0;  // seqlen - begin, so that both are maxima
    for (int64_t t = threadIdx.x; t < n; t += kThreads) {
      if (s.ids.at(b, t) < 0) continue;
      from_end = from_end > n - t ? from_end : n - t;
      end = t + 1;
    }
    const int64_t begin = n - block_max(from_end, shared);
    end = block_max(end, shared);
    const bool any = begin < end;
    const int64_t first = any ? s.ids.at(b, begin) : 0, last = any ? s.ids.at(b, end - 1) : 0;
    int64_t first_from_end = n - end, last_begin = begin;
    for (int64_t t = threadIdx.x + begin; any && t < end; t += kThreads) {
      const int64_t id = s.ids.at(b, t);
      if (id != first && n - t > first_from_end) first_from_end = n - t;
      if (id != last) last_begin = t + 1;
    }
    first_from_end = block_max(first_from_end, shared);
    last_begin = block_max(last_begin, shared);
    if (threadIdx.x == 0) {
      s.ends[b] = any ? RunEnds{begin, end, n - first_from_end, last_begin} : RunEnds{};
    }
  }
}

}  // namespace

void find_run_ends(const Sequences& s, cudaStream_t stream) {
  launch("find_run_ends", run_ends_kernel, blocks_for(s.batch, 1), kThreads, 0, stream, s);
}

}  // namespace statescan
