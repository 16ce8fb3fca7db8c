#include "common/arrays.cuh"

#include <type_traits>

#include "common/device_view.cuh"
#include "common/divisor.h"
#include "common/lanes.cuh"
#include "common/launch.h"

namespace statescan {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ int64_t first_task() {
  return int64_t(blockIdx.x) * kThreads + threadIdx.x;
}

// Thread: one number of a state.
__global__ __launch_bounds__(kThreads) void copy_kernel(const View<3> from, const View<3> to,
                                                        Divisor state, Divisor dim, int64_t tasks) {
  for (int64_t i = first_task(); i < tasks; i += int64_t(gridDim.x) * kThreads) {
    int64_t n, d;
    const int64_t slot = dim.divide(state.divide(i, n), d);
    auto at = [&](const View<3>& x) {
      return slot * x.stride[0] + d * x.stride[1] + n * x.stride[2];
    };
    const double x = from ? load_element<double>(from.data, from.dtype, at(from)) : 0.0;
    store_element(to.data, to.dtype, at(to), x);
  }
}

// `lanes` threads, 1 or 32: one number of the result, a part in `lanes` each.
template <class R>
__global__ __launch_bounds__(kThreads) void sum_kernel(const R* partial, int64_t parts, View<4> out,
                                                       Divisor size1, Divisor size2, Divisor size3,
                                                       int lanes, int64_t tasks) {
  const int lane = int(threadIdx.x) % lanes;
  for (int64_t i = first_task() / lanes; i < tasks; i += int64_t(gridDim.x) * (kThreads / lanes)) {
    R sum = 0;
#pragma unroll 4
    for (int64_t part = lane; part < parts; part += lanes) sum += partial[part * tasks + i];
    for (int by = lanes / 2; by > 0; by /= 2) sum += __shfl_xor_sync(kAllLanes, sum, by);
    if (lane > 0) continue;
    int64_t x1, x2, x3;
    const int64_t x0 = size1.divide(size2.divide(size3.divide(i, x3), x2), x1);
    store_element(out.data, out.dtype,
                  x0 * out.stride[0] + x1 * out.stride[1] + x2 * out.stride[2] + x3 * out.stride[3],
                  sum);
  }
}

}  // namespace

void copy_states(const View<3>& from, const View<3>& to, int64_t slots, int64_t dim, int64_t state,
                 cudaStream_t stream) {
  const int64_t tasks = slots * dim * state;
  if (tasks == 0) return;
  launch("copy_states", copy_kernel, blocks_for(tasks, kThreads), kThreads, 0, stream, from, to,
         Divisor(state), Divisor(dim), tasks);
}

void add_up(const void* partial, DType compute, int64_t parts, const int64_t (&size)[4],
            const View<4>& out, cudaStream_t stream) {
  const int64_t tasks = size[0] * size[1] * size[2] * size[3];
  if (tasks == 0) return;
  const int lanes = parts >= 64 && tasks < (1 << 15) ? 32 : 1;  // few numbers of many parts
  auto run = [&](auto* type) {
    using R = std::remove_pointer_t<decltype(type)>;
    launch("add_up", sum_kernel<R>, blocks_for(tasks * lanes, kThreads), kThreads, 0, stream,
           static_cast<const R*>(partial), parts, out, Divisor(size[1]), Divisor(size[2]),
           Divisor(size[3]), lanes, tasks);
  };
  compute == DType::kFloat64 ? run(static_cast<double*>(nullptr))
                             : run(static_cast<float*>(nullptr));
}

}  // namespace statescan
