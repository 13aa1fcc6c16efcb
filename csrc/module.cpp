// Python bindings of the CPU kernels: safecrit.ops._native. Plain data in, plain data out, no torch types.
#include <pybind11/pybind11.h>

#include "esi_accumulate.h"
#include "ops_module.h"
#include "select_module.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU kernels of safecrit.ops. Called through safecrit.ops, which checks the arguments.";
    module.def("variant", &safecrit::cpu_variant);
    safecrit::bind_ops(module);
    safecrit::bind_select(module);
    module.def(
        "esi_accumulate",
        [](uintptr_t acc, uintptr_t grad, int64_t rows, int64_t cols, int64_t acc_row_stride, int64_t acc_col_stride,
           int64_t grad_row_stride, int64_t grad_col_stride, float sigma, int dtype, int reduction, int threads) {
            const safecrit::AccumulateArgs args{
                reinterpret_cast<float*>(acc), reinterpret_cast<const void*>(grad), rows, cols, acc_row_stride,
                acc_col_stride, grad_row_stride, grad_col_stride, sigma, static_cast<safecrit::Dtype>(dtype),
                static_cast<safecrit::Reduction>(reduction)};
            return safecrit::esi_accumulate_cpu(args, threads);
        },
        py::call_guard<py::gil_scoped_release>(), py::arg("acc"), py::arg("grad"), py::arg("rows"), py::arg("cols"),
        py::arg("acc_row_stride"), py::arg("acc_col_stride"), py::arg("grad_row_stride"), py::arg("grad_col_stride"),
        py::arg("sigma"), py::arg("dtype"), py::arg("reduction"), py::arg("threads"));
}
