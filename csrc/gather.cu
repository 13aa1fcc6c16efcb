// The CUDA kernel of gather_: one grid-stride pass.
#include <cuda_runtime.h>

#include "cuda_check.h"
#include "cuda_load.h"
#include "gather.h"

namespace safecrit {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // as in adamw.cu

__global__ void __launch_bounds__(kThreads) gather(GatherArgs args) {
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.k; i += step) {
        const int64_t index =
            args.wide ? static_cast<const int64_t*>(args.indices)[i] : static_cast<const int32_t*>(args.indices)[i];
        if (index < 0 || index >= args.numel) continue;
        const float value = load_float(args.values, args.dtype, index);
        args.out[i] = args.add ? __fadd_rn(args.out[i], value) : value;
    }
}

}  // namespace

void gather_cuda(const GatherArgs& args, int device, void* stream) {
    if (args.k == 0) return;
    const DeviceGuard guard(device);
    const int64_t blocks = (args.k + kThreads - 1) / kThreads;
    const auto grid = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
    gather<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    SAFECRIT_CUDA_CHECK(cudaGetLastError());
}

}  // namespace safecrit
