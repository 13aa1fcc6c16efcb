// Reading and writing float32 values through a tensor's own dtype. The switch is uniform over a grid, so it costs a
// memory-bound kernel nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"

namespace safecrit {

__device__ inline float load_float(const void* data, Dtype dtype, int64_t i) {
    switch (dtype) {
        case Dtype::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
        case Dtype::float16: return __half2float(static_cast<const __half*>(data)[i]);
        case Dtype::float32: break;
    }
    return static_cast<const float*>(data)[i];
}

// Rounds to nearest, ties to even.
__device__ inline void store_float(void* data, Dtype dtype, int64_t i, float value) {
    switch (dtype) {
        case Dtype::bfloat16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value); return;
        case Dtype::float16: static_cast<__half*>(data)[i] = __float2half_rn(value); return;
        case Dtype::float32: break;
    }
    static_cast<float*>(data)[i] = value;
}

}  // namespace safecrit
