// The functions of select_module.cpp, for module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace safecrit {

void bind_select(pybind11::module_& module);

}  // namespace safecrit
