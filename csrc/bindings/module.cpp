// The Python module statescan._C: what was built and what this machine uses. Loading it registers
// the operators.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings/ceilings.h"
#include "common/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using statescan::Isa;
  m.doc() = "Compiled part of statescan.";
  m.def(
      "isa", [] { return statescan::isa_name(statescan::isa()); },
      "The instruction set in use: the widest here, or STATESCAN_ISA from the environment.");
  m.def(
      "supported_isas",
      [] {
        py::list names;
        for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
          if (statescan::isa_supported(isa)) names.append(statescan::isa_name(isa));
        }
        return names;
      },
      "The instruction sets that were compiled and that this machine has.");
  m.attr("compiler") = STATESCAN_COMPILER;
  m.attr("build_type") = STATESCAN_BUILD_TYPE;
  m.attr("torch_headers") = STATESCAN_TORCH_VERSION;
  m.attr("sanitizers") = STATESCAN_SANITIZERS;
#if defined(STATESCAN_CUDA)
  m.attr("cuda") = STATESCAN_CUDA;  // compiler and architectures
#else
  m.attr("cuda") = py::none();  // no CUDA kernels in this build
#endif
  statescan::bindings::add_ceilings(m);
  statescan::isa();  // an unknown STATESCAN_ISA fails here, at import
}
