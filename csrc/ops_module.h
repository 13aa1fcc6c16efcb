// Bindings of matrix_std, the AdamW steps, the mask encodings and the benchmarks' read.
//
// The functions take Python's plain numbers, and check them.
#pragma once

#include <pybind11/pybind11.h>

namespace safecrit {

void bind_ops(pybind11::module_& module);       // of _native
void bind_ops_cuda(pybind11::module_& module);  // of _cuda

}  // namespace safecrit
