// What Python and the tests' host code call.
#include <cstring>
#include <string>

#include "runtime.h"

namespace {
std::string fault;
}

extern "C" {

void simt_schedule(int policy, unsigned seed, int resident) {
  simt::schedule = {simt::Policy(policy), seed, resident};
}

// Bytes of shared memory that a block may have on the device.
void simt_shared_limit(long bytes) { simt::shared_limit = bytes; }

void simt_processors(int count) { simt::processors = count; }

// Forgets the tensors of the last call.
void simt_begin() {
  simt::forget_buffers();
  simt::take_host_fault();
  simt::launched.clear();
}

// Names of the kernels launched since then, a line each.
const char* simt_launched() { return simt::launched.c_str(); }

// What host code did wrong since then, or "".
const char* simt_host_fault() {
  fault = simt::take_host_fault();
  return fault.c_str();
}

}  // extern "C"
