// out[i] = values[indices[i]], or out[i] += values[indices[i]], in float32: what SET keeps of a dense gradient.
#pragma once

#include <cstdint>

#include "check.h"
#include "dtype.h"

namespace safecrit {

// `indices`: k of them, in any order, int32 or (`wide`) int64, into `numel` values.
struct GatherArgs {
    float* out;
    const void* values;
    const void* indices;
    int64_t numel, k;
    Dtype dtype;
    bool wide, add;
};

inline GatherArgs gather_args(uintptr_t out, uintptr_t values, uintptr_t indices, int64_t numel, int64_t k, int dtype,
                              bool wide, bool add) {
    const GatherArgs args{reinterpret_cast<float*>(out),
                          reinterpret_cast<const void*>(values),
                          reinterpret_cast<const void*>(indices),
                          numel,
                          k,
                          check_dtype(dtype),
                          wide,
                          add};
    check_memories({{"out", args.out, k, 4, true},
                    {"values", args.values, numel, item_size(args.dtype), false},
                    {"indices", args.indices, k, wide ? 8 : 4, false}});
    return args;
}

// On the CPU with at most `threads` threads. Throws std::invalid_argument, before anything changes, for an index
// outside the values.
void gather_cpu(const GatherArgs& args, int threads);

// On a CUDA device and stream; does not synchronise. Where an index lies outside, `out` keeps its value.
void gather_cuda(const GatherArgs& args, int device, void* stream);

}  // namespace safecrit
