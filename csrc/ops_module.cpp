#include "ops_module.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "adamw.h"
#include "bits.h"
#include "check.h"
#include "matrix_std.h"
#include "read_memory.h"

namespace py = pybind11;

namespace safecrit {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using PlainMatrix = std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>>;

std::vector<double> matrix_std(const std::vector<PlainMatrix>& matrices, int dtype, int threads) {
    std::vector<Matrix> converted;
    for (const auto& [address, shape, strides] : matrices) {
        converted.push_back({pointer<const void>(address), shape, strides});
    }
    return matrix_std_cpu(converted, check_dtype(dtype), threads);
}

AdamWSettings adamw_settings(const std::array<float, 7>& values) {
    return {values[0], values[1], values[2], values[3], values[4], values[5], values[6]};
}

void sparse_adamw(uintptr_t weight, uintptr_t indices, uintptr_t grad, uintptr_t master, uintptr_t exp_avg,
                  uintptr_t exp_avg_sq, int64_t numel, int64_t k, std::array<int, 2> dtypes,
                  const std::array<float, 7>& settings, int threads) {
    sparse_adamw_cpu({pointer<void>(weight), pointer<const int64_t>(indices), pointer<const void>(grad),
                      pointer<float>(master), pointer<float>(exp_avg), pointer<float>(exp_avg_sq), numel, k,
                      check_dtype(dtypes[0]), check_dtype(dtypes[1]), adamw_settings(settings)},
                     threads);
}

void masked_adamw(uintptr_t weight, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t bits,
                  int64_t numel, std::array<int, 4> dtypes, const std::array<float, 7>& settings, int threads) {
    masked_adamw_cpu({pointer<void>(weight), pointer<void>(exp_avg), pointer<void>(exp_avg_sq),
                      pointer<const void>(grad), pointer<const uint8_t>(bits), numel, check_dtype(dtypes[0]),
                      check_dtype(dtypes[1]), check_dtype(dtypes[2]), check_dtype(dtypes[3]),
                      adamw_settings(settings)},
                     threads);
}

}  // namespace

void bind_ops(py::module_& module) {
    const auto free = py::call_guard<py::gil_scoped_release>();
    module.def("matrix_std", &matrix_std, free, py::arg("matrices"), py::arg("dtype"), py::arg("threads"));
    module.def("sparse_adamw", &sparse_adamw, free, py::arg("weight"), py::arg("indices"), py::arg("grad"),
               py::arg("master"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("numel"), py::arg("k"),
               py::arg("dtypes"), py::arg("settings"), py::arg("threads"));
    module.def("masked_adamw", &masked_adamw, free, py::arg("weight"), py::arg("grad"), py::arg("exp_avg"),
               py::arg("exp_avg_sq"), py::arg("bits"), py::arg("numel"), py::arg("dtypes"), py::arg("settings"),
               py::arg("threads"));
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
