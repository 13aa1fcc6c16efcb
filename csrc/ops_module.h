// Bindings of matrix_std, the AdamW steps, the mask encodings and the benchmarks' read.
#pragma once

#include <pybind11/pybind11.h>

namespace safecrit {

void bind_ops(pybind11::module_& module);

}  // namespace safecrit
