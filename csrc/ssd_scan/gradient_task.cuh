// What the gradients with and without tensor cores share: a block's share of the work, and the sums
// over a cell that it leaves.
#pragma once

#include "ssd_scan/decays.cuh"

namespace statescan::ssd_scan::cuda {

struct GradientTask {
  int64_t part, group, b;  // part: which task of the group
  int64_t begin, end;      // heads
  Cell cell;
};

__device__ __forceinline__ GradientTask gradient_task(const GradientParams& p, int64_t i) {
  GradientTask t;
  t.part = i % p.tasks_per_group(), i /= p.tasks_per_group();
  t.group = i % p.groups, i /= p.groups;
  t.begin = t.group * p.group_heads() + t.part * p.heads_per_task;
  const int64_t group_end = (t.group + 1) * p.group_heads();
  t.end = t.begin + p.heads_per_task < group_end ? t.begin + p.heads_per_task : group_end;
  t.b = i / p.cells();
  t.cell = cell_at(p, i % p.cells());
  return t;
}

inline int64_t gradient_tasks(const GradientParams& p) {
  return p.batch * p.cells() * p.groups * p.tasks_per_group();
}

// The sums over a task's cell, for each head. A number is always added to by the same thread.
template <class R>
struct CellSums {
  const GradientParams& p;
  const GradientTask& task;

  __device__ __forceinline__ int64_t row(int64_t head) const {  // of (batch, cell, head)
    return (task.b * p.cells() + task.cell.index) * p.heads + head;
  }
  __device__ __forceinline__ R& skip(int64_t head, int64_t i) const {
    return static_cast<R*>(p.dD)[row(head) * (p.wide_D ? p.headdim : 1) + i];
  }
  __device__ __forceinline__ R& dA(int64_t head) const { return static_cast<R*>(p.dA)[row(head)]; }
  __device__ __forceinline__ R& ddt_bias(int64_t head) const {
    return static_cast<R*>(p.ddt_bias)[row(head)];
  }
  // What is the first of a sum does not wait for the 0 that is there.
  __device__ __forceinline__ void add(R& sum, R x, bool is_first) const {
    sum = is_first ? x : sum + x;
  }

  // By all threads, who wait afterwards.
  __device__ __forceinline__ void clear() const {
    const int64_t size = p.wide_D ? p.headdim : 1;
    for (int64_t h = task.begin; h < task.end; ++h) {
      if (threadIdx.x == 0) {
        dA(h) = 0, ddt_bias(h) = 0;
      }
      for (int64_t i = threadIdx.x; i < size; i += blockDim.x) skip(h, i) = 0;
    }
    __syncthreads();  // the sums are in place
  }
};

// Stores zeros as the gradient of dt where there is padding.
__device__ __forceinline__ void clear_dt(const GradientParams& p, const Piece& piece, int64_t h) {
  const View<3>& x = p.ddt;
  for (int t = int(threadIdx.x); t < piece.rows; t += int(blockDim.x)) {
    store_element(x.data, x.dtype,
                  piece.b * x.stride[0] + piece.time(t) * x.stride[1] + h * x.stride[2], 0.0f);
  }
}

// (batch, seqlen, group, state) of a task's part of dB or dC.
__device__ __forceinline__ View<4> part_view(const View<5>& x, int64_t part) {
  return {static_cast<char*>(x.data) + part * x.stride[0] * element_bytes(x.dtype),
          x.dtype,
          {x.stride[1], x.stride[2], x.stride[3], x.stride[4]}};
}

}  // namespace statescan::ssd_scan::cuda
