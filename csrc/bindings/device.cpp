#include "bindings/device.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace statescan::bindings {

void* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

void sum_partials(const partials::SumParams& params) {
  run_tasks([](const partials::SumParams& p, const Range& r) { partials::sum(p, r); }, params,
            params.tasks(), 0, 1 + 256 / (1 + params.size[3]));
}

}  // namespace statescan::bindings
