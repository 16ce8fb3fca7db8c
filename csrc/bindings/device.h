// Runs a CPU kernel over its tasks on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#include "common/isa.h"
#include "common/sum_partials.h"

namespace statescan::bindings {

// Memory for one thread to work in, 64-byte aligned; kept for the thread's next call.
void* thread_scratch(int64_t bytes);

// kernel(params, Range) for every task in [0, tasks). Threads take the next `grain` tasks as they
// come free, so uneven sequences do not leave a thread idle; which thread runs a task never shows in
// the result. Work of up to `grain` tasks stays on the calling thread.
template <class Kernel, class Params>
void run_tasks(Kernel kernel, const Params& params, int64_t tasks, int64_t scratch_bytes,
               int64_t grain = 1) {
  if (tasks <= grain) {
    if (tasks > 0) kernel(params, Range{0, tasks, thread_scratch(scratch_bytes)});
    return;
  }
  const int64_t shares = (tasks + grain - 1) / grain;
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < shares ? threads : shares, 1, [&](int64_t, int64_t) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t i = next++; i < shares; i = next++) {
      const int64_t begin = i * grain, end = begin + grain;
      kernel(params, Range{begin, end < tasks ? end : tasks, scratch});
    }
  });
}

// Adds up partial sums, on several threads where there are many.
void sum_partials(const partials::SumParams& params);

}  // namespace statescan::bindings
