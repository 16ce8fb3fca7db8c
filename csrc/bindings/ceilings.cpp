#include "bindings/ceilings.h"

#include "bindings/device.h"
#include "common/ceilings.h"

namespace statescan::bindings {
namespace {

using ceilings::Params;

// Numbers in a vector of the instruction set in use.
int64_t float_lanes() {
  switch (isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAvx512: return 16;
    case Isa::kAvx2: return 8;
    case Isa::kBaseline: return 4;
  }
  return 4;
}

template <class Kernel>
void run(Kernel kernel, int64_t tasks, int64_t repetitions) {
  if (tasks < 0 || repetitions < 0) {
    throw std::invalid_argument("tasks and repetitions must not be negative");
  }
  pybind11::gil_scoped_release release;
  run_tasks(kernel, Params{repetitions}, tasks, Params::scratch_bytes());
}

int64_t run_exp2(int64_t tasks, int64_t repetitions) {
  run([](const Params& p, const Range& range) { ceilings::exp2_task(p, range); }, tasks,
      repetitions);
  return tasks * repetitions * Params::kExps;
}

int64_t run_fma(int64_t tasks, int64_t repetitions) {
  run([](const Params& p, const Range& range) { ceilings::fma_task(p, range); }, tasks,
      repetitions);
  return tasks * repetitions * Params::kChains * Params::kSteps * float_lanes();
}

}  // namespace

void add_ceilings(pybind11::module_& m) {
  m.def("run_exp2", &run_exp2, pybind11::arg("tasks"), pybind11::arg("repetitions"),
        "Runs the kernels' exp2 on torch's threads over numbers in cache; returns how many times.");
  m.def("run_fma", &run_fma, pybind11::arg("tasks"), pybind11::arg("repetitions"),
        "Runs float32 multiply-adds on torch's threads in registers; returns how many.");
}

}  // namespace statescan::bindings
