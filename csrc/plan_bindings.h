// The part of the Python module that records and runs plans.
#pragma once

#include <pybind11/pybind11.h>

namespace ddim_fast {

void bind_plan(pybind11::module_& module);

}  // namespace ddim_fast
