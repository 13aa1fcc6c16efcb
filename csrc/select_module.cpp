// Python bindings of select_top and select_random.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "select_module.h"
#include "select_top.h"

namespace py = pybind11;

namespace safecrit {
namespace {

py::tuple select_top(const std::vector<uintptr_t>& data, const std::vector<int64_t>& sizes,
                     const std::vector<int>& dtypes, int64_t k, bool largest, uintptr_t out, uintptr_t counts,
                     int threads, int64_t segment, int64_t runs, int64_t run, int64_t low, int64_t high) {
    SelectTopArgs args{{}, sizes, {}, k, largest, reinterpret_cast<int64_t*>(out), reinterpret_cast<int64_t*>(counts)};
    for (const uintptr_t pointer : data) args.data.push_back(reinterpret_cast<const void*>(pointer));
    for (const int dtype : dtypes) args.dtypes.push_back(static_cast<Dtype>(dtype));
    SelectTopResult found;
    {
        const py::gil_scoped_release release;
        found = select_top_cpu(args, {segment, runs, run, low, high}, threads);
    }
    return py::make_tuple(found.enough, found.threshold_bits, found.tied, found.tied_selected, found.nan,
                          found.passes);
}

}  // namespace

void bind_select(py::module_& module) {
    const SelectTuning tuning;
    module.def("select_top", &select_top, py::arg("data"), py::arg("sizes"), py::arg("dtypes"), py::arg("k"),
               py::arg("largest"), py::arg("out"), py::arg("counts"), py::arg("threads"), py::kw_only(),
               py::arg("segment") = tuning.segment, py::arg("runs") = tuning.runs, py::arg("run") = tuning.run,
               py::arg("low") = tuning.low, py::arg("high") = tuning.high);
    module.def(
        "rank_counts",
        [](const std::vector<uintptr_t>& data, const std::vector<int64_t>& sizes, const std::vector<int>& dtypes,
           bool largest, uint32_t low, uint32_t high, int shift, int threads) {
            std::vector<int64_t> unused(sizes.size());
            SelectTopArgs args{{}, sizes, {}, 0, largest, nullptr, unused.data()};
            for (const uintptr_t pointer : data) args.data.push_back(reinterpret_cast<const void*>(pointer));
            for (const int dtype : dtypes) args.dtypes.push_back(static_cast<Dtype>(dtype));
            return rank_counts_cpu(args, low, high, shift, threads);
        },
        py::call_guard<py::gil_scoped_release>(), py::arg("data"), py::arg("sizes"), py::arg("dtypes"),
        py::arg("largest"), py::arg("low"), py::arg("high"), py::arg("shift"), py::arg("threads"));
    module.def(
        "select_random",
        [](const std::vector<uint64_t>& positions, const std::vector<int64_t>& sizes, int64_t k, uint64_t seed,
           uintptr_t out, uintptr_t counts, int threads) {
            select_random_cpu(positions, sizes, k, seed, reinterpret_cast<int64_t*>(out),
                              reinterpret_cast<int64_t*>(counts), threads);
        },
        py::call_guard<py::gil_scoped_release>(), py::arg("positions"), py::arg("sizes"), py::arg("k"),
        py::arg("seed"), py::arg("out"), py::arg("counts"), py::arg("threads"));
}

}  // namespace safecrit
