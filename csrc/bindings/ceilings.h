// Adds the measurements of csrc/common/ceilings.h to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace statescan::bindings {

void add_ceilings(pybind11::module_& m);

}  // namespace statescan::bindings
