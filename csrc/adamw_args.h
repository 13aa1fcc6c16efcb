// Python's plain numbers made into the AdamW kernels' arguments, and checked; std::invalid_argument where they are bad.
#pragma once

#include <array>

#include "adamw.h"
#include "check.h"

namespace safecrit {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// clip, 1 - beta1, beta2, 1 - beta2, keep, step_size, eps.
using Factors = std::array<float, 7>;

inline AdamWSettings adamw_settings(const Factors& values) {
    return {values[0], values[1], values[2], values[3], values[4], values[5], values[6]};
}

// dtypes: of weight and gradient.
inline SparseAdamWArgs sparse_adamw_args(uintptr_t weight, uintptr_t indices, uintptr_t grad, uintptr_t master,
                                         uintptr_t exp_avg, uintptr_t exp_avg_sq, int64_t numel, int64_t k,
                                         const std::array<int, 2>& dtypes, const Factors& factors) {
    const SparseAdamWArgs args{pointer<void>(weight),       pointer<const int64_t>(indices), pointer<const void>(grad),
                               pointer<float>(master),      pointer<float>(exp_avg),         pointer<float>(exp_avg_sq),
                               numel,                       k,                               check_dtype(dtypes[0]),
                               check_dtype(dtypes[1]),      adamw_settings(factors)};
    check_memories({{"weight", args.weight, numel, item_size(args.weight_dtype), true},
                    {"indices", args.indices, k, 8, false},
                    {"grad_k", args.grad, k, item_size(args.grad_dtype), false},
                    {"master", args.master, k, 4, true},
                    {"exp_avg", args.exp_avg, k, 4, true},
                    {"exp_avg_sq", args.exp_avg_sq, k, 4, true}});
    return args;
}

// dtypes: of weight, gradient and the two moments.
inline MaskedAdamWArgs masked_adamw_args(uintptr_t weight, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq,
                                         uintptr_t bits, int64_t numel, const std::array<int, 4>& dtypes,
                                         const Factors& factors) {
    const MaskedAdamWArgs args{pointer<void>(weight),
                               pointer<void>(exp_avg),
                               pointer<void>(exp_avg_sq),
                               pointer<const void>(grad),
                               pointer<const uint8_t>(bits),
                               numel,
                               check_dtype(dtypes[0]),
                               check_dtype(dtypes[1]),
                               check_dtype(dtypes[2]),
                               check_dtype(dtypes[3]),
                               adamw_settings(factors)};
    require(numel >= 0, "numel is negative");
    check_memories({{"weight", args.weight, numel, item_size(args.weight_dtype), true},
                    {"grad", args.grad, numel, item_size(args.grad_dtype), false},
                    {"exp_avg", args.exp_avg, numel, item_size(args.exp_avg_dtype), true},
                    {"exp_avg_sq", args.exp_avg_sq, numel, item_size(args.exp_avg_sq_dtype), true},
                    {"bits", args.bits, numel / 8 + (numel % 8 != 0), 1, false}});
    return args;
}

}  // namespace safecrit
