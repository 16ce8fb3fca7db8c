// Which kernels a call of the SSD scan consists of, and the states between the parts of a sequence.
#include <algorithm>

#include "common/divisor.h"
#include "common/launch.h"
#include "ssd_scan/kinds.h"

namespace statescan::ssd_scan::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 8;  // parts that are read at once: their loads wait for one another no more

// Thread: one number of the state of a head, along all parts. The end of the walk through each part
// becomes what enters the next one; the first part's already is.
template <class R>
__global__ __launch_bounds__(kThreads) void carry_kernel(const WalkParams p, Divisor state_size,
                                                         int64_t tasks) {
  R* carry = static_cast<R*>(p.carry);
  const R* factor = static_cast<const R*>(p.factor);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < tasks;
       i += int64_t(gridDim.x) * kThreads) {
    int64_t element;
    const int64_t row = state_size.divide(i, element), rows = p.batch * p.heads;
    R S = carry[tasks + i];
    for (int64_t first = 2; first < p.parts; first += kAhead) {
      R a[kAhead], walked[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (first + k >= p.parts) break;
        a[k] = factor[(first + k) * rows + row], walked[k] = carry[(first + k) * tasks + i];
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (first + k >= p.parts) break;
        // Where decays grow, the part's may be infinite though no cell's is: zero stays zero.
        S = a[k] < 0 || S == 0 ? walked[k] : a[k] * S + walked[k];
        carry[(first + k) * tasks + i] = S;
      }
    }
  }
}

void walk_once(const WalkParams& p, cudaStream_t stream) {
  if (has_hopper_walk(p)) return hopper_walk(p, stream);
  has_tensor_walk(p) ? tensor_walk(p, stream) : plain_walk(p, stream);
}

void find_carries(WalkParams p, cudaStream_t stream) {
  p.summarize = true;
  walk_once(p, stream);
  const int64_t tasks = p.batch * p.heads * p.state * p.headdim;
  auto run = [&](auto* type) {
    launch("ssd_scan carry", carry_kernel<std::remove_pointer_t<decltype(type)>>,
           blocks_for(tasks, kThreads), kThreads, 0, stream, p, Divisor(p.state * p.headdim),
           tasks);
  };
  p.compute == DType::kFloat64 ? run(static_cast<double*>(nullptr))
                               : run(static_cast<float*>(nullptr));
}

int64_t part(int64_t whole, int64_t by) { return (whole + by - 1) / by; }

}  // namespace

Room walk_room(const WalkParams& p) {
  return has_tensor_walk(p) ? Room{0, 0, true} : plain_walk_room(p);
}
Room gradient_room(const GradientParams& p) {
  return has_tensor_gradients(p) ? Room{0, 0, true} : plain_gradient_room(p);
}

// Two blocks to each of 132 multiprocessors keep them busy. Fewer: sequences are cut into parts of
// at least 4 cells. It costs a second update of the states.
int64_t parts_of(const Shape& p) {
  const int64_t tasks = p.batch * p.heads * part(p.headdim, 64);
  if (tasks == 0 || tasks >= 2 * 132) return 1;
  return std::max<int64_t>(1, std::min(part(2 * 132, tasks), p.cells() / 4));
}

// With one block to each of 132 multiprocessors, a wave of blocks takes as long as their heads and
// what comes once for a block: B, C and G, which cost as much as two heads, and partial sums of dB
// and dC, which cost two more.
int64_t heads_of_task(const Shape& p) {
  const int64_t cells = p.batch * p.cells() * p.groups,
                heads = std::max<int64_t>(p.group_heads(), 1);
  int64_t best = heads, least = part(cells, 132) * (heads + 2);
  for (int64_t parts = 2; parts <= std::min<int64_t>(heads, 132); ++parts) {
    const int64_t own = part(heads, parts), cost = part(cells * part(heads, own), 132) * (own + 4);
    if (cost < least) best = own, least = cost;
  }
  return best;
}

void walk(const WalkParams& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.headdim * p.seqlen == 0) return;
  if (p.parts > 1) find_carries(p, stream);
  walk_once(p, stream);
}

void gradients(const GradientParams& p, cudaStream_t stream) {
  has_tensor_gradients(p) ? tensor_gradients(p, stream) : plain_gradients(p, stream);
}

}  // namespace statescan::ssd_scan::cuda
