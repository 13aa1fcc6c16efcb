// The CUDA kernels of sparse_adamw_ and masked_adamw_: one grid-stride pass, every operation rounded by itself, so
// that they give the bits of the CPU kernels.
#include <cuda_runtime.h>

#include "adamw.h"
#include "cuda_check.h"
#include "cuda_load.h"

namespace safecrit {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // 16 blocks on each of an H100's 132 multiprocessors fill the memory pipes

unsigned grid(int64_t entries) {
    const int64_t blocks = (entries + kThreads - 1) / kThreads;
    return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ inline void update(float& weight, float grad, float& exp_avg, float& exp_avg_sq, const AdamWSettings& with) {
    const float g = __fmul_rn(grad, with.clip);
    exp_avg = __fadd_rn(exp_avg, __fmul_rn(with.one_minus_beta1, __fsub_rn(g, exp_avg)));
    const float square = __fmul_rn(__fmul_rn(with.one_minus_beta2, g), g);
    exp_avg_sq = __fadd_rn(__fmul_rn(with.beta2, exp_avg_sq), square);
    const float denominator = __fadd_rn(__fsqrt_rn(exp_avg_sq), with.eps);
    const float change = __fdiv_rn(__fmul_rn(with.step_size, exp_avg), denominator);
    weight = __fsub_rn(__fmul_rn(with.keep, weight), change);
}

__global__ void __launch_bounds__(kThreads) sparse(SparseAdamWArgs args) {
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.k; i += step) {
        float weight = args.master[i], exp_avg = args.exp_avg[i], exp_avg_sq = args.exp_avg_sq[i];
        update(weight, load_float(args.grad, args.grad_dtype, i), exp_avg, exp_avg_sq, args.settings);
        args.master[i] = weight;
        args.exp_avg[i] = exp_avg;
        args.exp_avg_sq[i] = exp_avg_sq;
        const int64_t index = args.indices[i];
        if (index >= 0 && index < args.numel) store_float(args.weight, args.weight_dtype, index, weight);
    }
}

__global__ void __launch_bounds__(kThreads) masked(MaskedAdamWArgs args) {
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.numel; i += step) {
        if ((args.bits[i / 8] >> (i % 8) & 1) != 0) continue;
        float weight = load_float(args.weight, args.weight_dtype, i);
        float exp_avg = load_float(args.exp_avg, args.exp_avg_dtype, i);
        float exp_avg_sq = load_float(args.exp_avg_sq, args.exp_avg_sq_dtype, i);
        update(weight, load_float(args.grad, args.grad_dtype, i), exp_avg, exp_avg_sq, args.settings);
        store_float(args.weight, args.weight_dtype, i, weight);
        store_float(args.exp_avg, args.exp_avg_dtype, i, exp_avg);
        store_float(args.exp_avg_sq, args.exp_avg_sq_dtype, i, exp_avg_sq);
    }
}

}  // namespace

void sparse_adamw_cuda(const SparseAdamWArgs& args, int device, void* stream) {
    if (args.k == 0) return;
    const DeviceGuard guard(device);
    sparse<<<grid(args.k), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    SAFECRIT_CUDA_CHECK(cudaGetLastError());
}

void masked_adamw_cuda(const MaskedAdamWArgs& args, int device, void* stream) {
    if (args.numel == 0) return;
    const DeviceGuard guard(device);
    masked<<<grid(args.numel), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    SAFECRIT_CUDA_CHECK(cudaGetLastError());
}

}  // namespace safecrit
