// The CUDA kernel of esi_accumulate_: one grid-stride pass, product and sum rounded separately so that it
// gives the bits of the CPU kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda_check.h"
#include "esi_accumulate.h"

namespace safecrit {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // 16 blocks on each of an H100's 132 multiprocessors fill the memory pipes

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float as_float(__half value) { return __half2float(value); }

template <Reduction reduction>
__device__ inline float contribution(float gradient, float sigma) {
    if constexpr (reduction == Reduction::square) return __fmul_rn(gradient, gradient);
    const float product = __fmul_rn(sigma, gradient);
    return reduction == Reduction::absolute ? fabsf(product) : product;
}

// Returns whether the entry was skipped.
template <typename T, Reduction reduction>
__device__ inline bool add(float* acc, T grad, float sigma) {
    const float gradient = as_float(grad);
    if (!isfinite(gradient)) return true;
    *acc = __fadd_rn(*acc, contribution<reduction>(gradient, sigma));
    return false;
}

template <typename T, Reduction reduction, bool contiguous>
__global__ void __launch_bounds__(kThreads) accumulate(AccumulateArgs args, unsigned long long* skipped) {
    const T* grad = static_cast<const T*>(args.grad);
    const int64_t total = args.rows * args.cols, step = int64_t{gridDim.x} * blockDim.x;
    unsigned bad = 0;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
        if constexpr (contiguous) {
            bad += add<T, reduction>(args.acc + i, grad[i], args.sigma);
        } else {
            const int64_t r = i / args.cols, c = i - r * args.cols;
            bad += add<T, reduction>(args.acc + r * args.acc_row_stride + c * args.acc_col_stride,
                                     grad[r * args.grad_row_stride + c * args.grad_col_stride], args.sigma);
        }
    }
    bad = __reduce_add_sync(0xffffffffu, bad);
    if (bad != 0 && threadIdx.x % 32 == 0) atomicAdd(skipped, static_cast<unsigned long long>(bad));
}

template <typename T, Reduction reduction>
void launch(const AccumulateArgs& args, unsigned long long* skipped, cudaStream_t stream) {
    const int64_t total = args.rows * args.cols;
    const int64_t blocks = (total + kThreads - 1) / kThreads;
    const auto grid = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
    const bool rows_join = args.rows == 1 || (args.acc_row_stride == args.cols && args.grad_row_stride == args.cols);
    if (args.acc_col_stride == 1 && args.grad_col_stride == 1 && rows_join) {
        accumulate<T, reduction, true><<<grid, kThreads, 0, stream>>>(args, skipped);
    } else {
        accumulate<T, reduction, false><<<grid, kThreads, 0, stream>>>(args, skipped);
    }
    SAFECRIT_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void launch_reduction(const AccumulateArgs& args, unsigned long long* skipped, cudaStream_t stream) {
    switch (args.reduction) {
        case Reduction::signed_sum: return launch<T, Reduction::signed_sum>(args, skipped, stream);
        case Reduction::absolute: return launch<T, Reduction::absolute>(args, skipped, stream);
        case Reduction::square: return launch<T, Reduction::square>(args, skipped, stream);
    }
}

}  // namespace

void esi_accumulate_cuda(const AccumulateArgs& args, int64_t* skipped, int device, void* stream) {
    if (args.rows == 0 || args.cols == 0) return;
    const DeviceGuard guard(device);
    auto* count = reinterpret_cast<unsigned long long*>(skipped);
    auto* queue = static_cast<cudaStream_t>(stream);
    switch (args.dtype) {
        case Dtype::float32: return launch_reduction<float>(args, count, queue);
        case Dtype::bfloat16: return launch_reduction<__nv_bfloat16>(args, count, queue);
        case Dtype::float16: return launch_reduction<__half>(args, count, queue);
    }
}

}  // namespace safecrit
