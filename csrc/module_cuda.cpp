// Python bindings of the CUDA kernels: safecrit.ops._cuda. Plain data in, plain data out, no torch types.
#include <pybind11/pybind11.h>

#include "esi_accumulate.h"
#include "ops_module.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of safecrit.ops. Called through safecrit.ops, which checks the arguments.";
    module.attr("MINIMUM_CAPABILITY") = SAFECRIT_MINIMUM_CAPABILITY;
    safecrit::bind_ops_cuda(module);
    module.def(
        "esi_accumulate",
        [](uintptr_t acc, uintptr_t grad, int64_t rows, int64_t cols, int64_t acc_row_stride, int64_t acc_col_stride,
           int64_t grad_row_stride, int64_t grad_col_stride, float sigma, int dtype, int reduction, uintptr_t skipped,
           int device, uintptr_t stream) {
            const safecrit::AccumulateArgs args{
                reinterpret_cast<float*>(acc), reinterpret_cast<const void*>(grad), rows, cols, acc_row_stride,
                acc_col_stride, grad_row_stride, grad_col_stride, sigma, static_cast<safecrit::Dtype>(dtype),
                static_cast<safecrit::Reduction>(reduction)};
            safecrit::esi_accumulate_cuda(args, reinterpret_cast<int64_t*>(skipped), device,
                                          reinterpret_cast<void*>(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::arg("acc"), py::arg("grad"), py::arg("rows"), py::arg("cols"),
        py::arg("acc_row_stride"), py::arg("acc_col_stride"), py::arg("grad_row_stride"), py::arg("grad_col_stride"),
        py::arg("sigma"), py::arg("dtype"), py::arg("reduction"), py::arg("skipped"), py::arg("device"),
        py::arg("stream"));
}
