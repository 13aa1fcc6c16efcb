#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "adamw_args.h"
#include "gather.h"
#include "matrix_std.h"
#include "ops_module.h"
#include "select_top.h"

namespace py = pybind11;

namespace safecrit {
namespace {

void matrix_std(uintptr_t data, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, int dtype,
                uintptr_t scratch, uintptr_t result, int device, uintptr_t stream) {
    constexpr size_t kDims = 4;
    require(shape.size() == strides.size() && shape.size() <= kDims, "shape and strides must have at most 4 entries");
    CudaMatrix matrix{pointer<const void>(data), 1, {1, 1, 1, 1}, {0, 0, 0, 0}};
    int64_t reach = 1;
    for (size_t d = 0; d < shape.size(); ++d) {
        matrix.count = checked_product(matrix.count, shape[d]);
        reach += checked_product(std::max<int64_t>(shape[d] - 1, 0), strides[d]);
        require(reach <= kMostBytes, "sizes and strides are too large");
        matrix.shape[kDims - shape.size() + d] = shape[d];
        matrix.strides[kDims - shape.size() + d] = strides[d];
    }
    const Dtype kind = check_dtype(dtype);
    check_memories({{"weight", matrix.data, matrix.count == 0 ? 0 : reach, item_size(kind), false},
                    {"scratch", pointer<double>(scratch), 2 * matrix_std_cuda_blocks(matrix.count), 8, true},
                    {"result", pointer<double>(result), 1, 8, true}});
    matrix_std_cuda(matrix, kind, pointer<double>(scratch), pointer<double>(result), device, pointer<void>(stream));
}

struct SelectCall {
    SelectTopArgs args;
    SelectCudaTuning tuning;
};

SelectCall select_call(const std::vector<uintptr_t>& data, const std::vector<int64_t>& sizes,
                       const std::vector<int>& dtypes, int64_t k, bool largest, uintptr_t out, uintptr_t result,
                       bool exact, int64_t room, int64_t place) {
    // The counts follow the other results.
    SelectCall call{{{}, sizes, {}, k, largest, pointer<int64_t>(out), pointer<int64_t>(result)}, {exact, room, place}};
    for (const uintptr_t one : data) call.args.data.push_back(pointer<const void>(one));
    for (const int dtype : dtypes) call.args.dtypes.push_back(static_cast<Dtype>(dtype));
    return call;
}

}  // namespace

void bind_ops_cuda(py::module_& module) {
    const auto free = py::call_guard<py::gil_scoped_release>();
    module.def("matrix_std_blocks", [](int64_t count) {
        require(count >= 0 && count <= kMostBytes, "bad count");
        return matrix_std_cuda_blocks(count);
    }, py::arg("count"));
    module.def("matrix_std", &matrix_std, free, py::arg("data"), py::arg("shape"), py::arg("strides"),
               py::arg("dtype"), py::arg("scratch"), py::arg("result"), py::arg("device"), py::arg("stream"));
    module.attr("SELECT_RESULTS") = static_cast<int>(kSelectResults);
    module.def(
        "select_top",
        [](const std::vector<uintptr_t>& data, const std::vector<int64_t>& sizes, const std::vector<int>& dtypes,
           int64_t k, bool largest, uintptr_t out, uintptr_t result, bool exact, int64_t room, int64_t place,
           uintptr_t scratch, int device, uintptr_t stream) {
            const SelectCall call = select_call(data, sizes, dtypes, k, largest, out, result, exact, room, place);
            select_top_cuda(call.args, call.tuning, pointer<int64_t>(result), pointer<void>(scratch), device,
                            pointer<void>(stream));
        },
        free, py::arg("data"), py::arg("sizes"), py::arg("dtypes"), py::arg("k"), py::arg("largest"), py::arg("out"),
        py::arg("result"), py::arg("exact"), py::arg("room"), py::arg("place"), py::arg("scratch"), py::arg("device"),
        py::arg("stream"));
    module.def(
        "select_top_scratch",
        [](const std::vector<uintptr_t>& data, const std::vector<int64_t>& sizes, const std::vector<int>& dtypes,
           int64_t k, bool largest, uintptr_t out, uintptr_t result, bool exact, int64_t room, int64_t place) {
            const SelectCall call = select_call(data, sizes, dtypes, k, largest, out, result, exact, room, place);
            return select_top_cuda_scratch(call.args, call.tuning);
        },
        py::arg("data"), py::arg("sizes"), py::arg("dtypes"), py::arg("k"), py::arg("largest"), py::arg("out"),
        py::arg("result"), py::arg("exact"), py::arg("room"), py::arg("place"));
    module.def(
        "sparse_adamw",
        [](uintptr_t weight, uintptr_t indices, uintptr_t grad, uintptr_t master, uintptr_t exp_avg,
           uintptr_t exp_avg_sq, int64_t numel, int64_t k, const std::array<int, 2>& dtypes, const Factors& factors,
           int device, uintptr_t stream) {
            sparse_adamw_cuda(sparse_adamw_args(weight, indices, grad, master, exp_avg, exp_avg_sq, numel, k, dtypes,
                                                factors),
                              device, pointer<void>(stream));
        },
        free, py::arg("weight"), py::arg("indices"), py::arg("grad"), py::arg("master"), py::arg("exp_avg"),
        py::arg("exp_avg_sq"), py::arg("numel"), py::arg("k"), py::arg("dtypes"), py::arg("factors"),
        py::arg("device"), py::arg("stream"));
    module.def(
        "gather",
        [](uintptr_t out, uintptr_t values, uintptr_t indices, int64_t numel, int64_t k, int dtype, bool wide, bool add,
           int device, uintptr_t stream) {
            gather_cuda(gather_args(out, values, indices, numel, k, dtype, wide, add), device, pointer<void>(stream));
        },
        free, py::arg("out"), py::arg("values"), py::arg("indices"), py::arg("numel"), py::arg("k"), py::arg("dtype"),
        py::arg("wide"), py::arg("add"), py::arg("device"), py::arg("stream"));
    module.def(
        "masked_adamw",
        [](uintptr_t weight, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t bits, int64_t numel,
           const std::array<int, 4>& dtypes, const Factors& factors, int device, uintptr_t stream) {
            masked_adamw_cuda(masked_adamw_args(weight, grad, exp_avg, exp_avg_sq, bits, numel, dtypes, factors),
                              device, pointer<void>(stream));
        },
        free, py::arg("weight"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("bits"),
        py::arg("numel"), py::arg("dtypes"), py::arg("factors"), py::arg("device"), py::arg("stream"));
}

}  // namespace safecrit
