// One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), on selected entries or on all that are not frozen.
//
//     g = clip * grad
//     m = m + (1 - beta1) * (g - m)
//     v = beta2 * v + ((1 - beta2) * g) * g
//     w = (1 - lr * decay) * w - (step_size * m) / (sqrt(v) + eps)
//
// step_size and eps hold both bias corrections: torch divides m by 1 - beta1^t and sqrt(v) by r = sqrt(1 - beta2^t);
// here step_size = lr * r / (1 - beta1^t) and eps = r * torch's. All in float32, each operation rounded, so the C++,
// CUDA and Triton kernels give the same bits.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace safecrit {

struct AdamWSettings {
    float clip, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, eps;  // keep: 1 - lr * decay
};

// The selected entries: `indices`, unique, into a weight of `numel` entries; all else has k entries.
struct SparseAdamWArgs {
    void* weight;
    const int64_t* indices;
    const void* grad;
    float *master, *exp_avg, *exp_avg_sq;
    int64_t numel, k;
    Dtype weight_dtype, grad_dtype;
    AdamWSettings settings;
};

// Entry i is frozen where bit i % 8 of byte i / 8 is set: nothing of it is changed.
struct MaskedAdamWArgs {
    void *weight, *exp_avg, *exp_avg_sq;
    const void* grad;
    const uint8_t* bits;
    int64_t numel;
    Dtype weight_dtype, grad_dtype, exp_avg_dtype, exp_avg_sq_dtype;
    AdamWSettings settings;
};

// On the CPU with at most `threads` threads; adamw_args.h checks pointers and sizes. sparse_adamw_cpu throws
// std::invalid_argument, before anything changes, for an index outside the weight.
void sparse_adamw_cpu(const SparseAdamWArgs& args, int threads);
void masked_adamw_cpu(const MaskedAdamWArgs& args, int threads);

// On a CUDA device and stream; do not synchronise. An index outside the weight writes nothing there.
void sparse_adamw_cuda(const SparseAdamWArgs& args, int device, void* stream);
void masked_adamw_cuda(const MaskedAdamWArgs& args, int device, void* stream);

}  // namespace safecrit
