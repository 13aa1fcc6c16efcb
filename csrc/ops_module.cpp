#include "ops_module.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "adamw_args.h"
#include "bits.h"
#include "gather.h"
#include "matrix_std.h"
#include "read_memory.h"

namespace py = pybind11;

namespace safecrit {
namespace {

using PlainMatrix = std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>>;

std::vector<double> matrix_std(const std::vector<PlainMatrix>& matrices, int dtype, int threads) {
    std::vector<Matrix> converted;
    for (const auto& [address, shape, strides] : matrices) {
        converted.push_back({pointer<const void>(address), shape, strides});
    }
    return matrix_std_cpu(converted, check_dtype(dtype), threads);
}

}  // namespace

void bind_ops(py::module_& module) {
    const auto free = py::call_guard<py::gil_scoped_release>();
    module.def("matrix_std", &matrix_std, free, py::arg("matrices"), py::arg("dtype"), py::arg("threads"));
    module.def(
        "sparse_adamw",
        [](uintptr_t weight, uintptr_t indices, uintptr_t grad, uintptr_t master, uintptr_t exp_avg,
           uintptr_t exp_avg_sq, int64_t numel, int64_t k, const std::array<int, 2>& dtypes, const Factors& factors,
           int threads) {
            sparse_adamw_cpu(sparse_adamw_args(weight, indices, grad, master, exp_avg, exp_avg_sq, numel, k, dtypes,
                                               factors),
                             threads);
        },
        free, py::arg("weight"), py::arg("indices"), py::arg("grad"), py::arg("master"), py::arg("exp_avg"),
        py::arg("exp_avg_sq"), py::arg("numel"), py::arg("k"), py::arg("dtypes"), py::arg("factors"),
        py::arg("threads"));
    module.def(
        "gather",
        [](uintptr_t out, uintptr_t values, uintptr_t indices, int64_t numel, int64_t k, int dtype, bool wide, bool add,
           int threads) {
            gather_cpu(gather_args(out, values, indices, numel, k, dtype, wide, add), threads);
        },
        free, py::arg("out"), py::arg("values"), py::arg("indices"), py::arg("numel"), py::arg("k"), py::arg("dtype"),
        py::arg("wide"), py::arg("add"), py::arg("threads"));
    module.def(
        "masked_adamw",
        [](uintptr_t weight, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t bits, int64_t numel,
           const std::array<int, 4>& dtypes, const Factors& factors, int threads) {
            masked_adamw_cpu(masked_adamw_args(weight, grad, exp_avg, exp_avg_sq, bits, numel, dtypes, factors),
                             threads);
        },
        free, py::arg("weight"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("bits"),
        py::arg("numel"), py::arg("dtypes"), py::arg("factors"), py::arg("threads"));
    module.def(
        "bits_from_indices",
        [](uintptr_t indices, int64_t k, int64_t numel, uintptr_t bits, int threads) {
            bits_from_indices_cpu(pointer<const int64_t>(indices), k, numel, pointer<uint8_t>(bits), threads);
        },
        free, py::arg("indices"), py::arg("k"), py::arg("numel"), py::arg("bits"), py::arg("threads"));
    module.def(
        "count_bits",
        [](uintptr_t bits, int64_t bytes, int threads) {
            return count_bits_cpu(pointer<const uint8_t>(bits), bytes, threads);
        },
        free, py::arg("bits"), py::arg("bytes"), py::arg("threads"));
    module.def(
        "indices_from_bits",
        [](uintptr_t bits, int64_t bytes, uintptr_t indices, int64_t k, int threads) {
            indices_from_bits_cpu(pointer<const uint8_t>(bits), bytes, pointer<int64_t>(indices), k, threads);
        },
        free, py::arg("bits"), py::arg("bytes"), py::arg("indices"), py::arg("k"), py::arg("threads"));
    module.def(
        "read_memory",
        [](uintptr_t data, int64_t bytes, int threads) {
            return read_memory(pointer<const void>(data), bytes, threads);
        },
        free, py::arg("data"), py::arg("bytes"), py::arg("threads"));
}

}  // namespace safecrit
