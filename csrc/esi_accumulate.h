// esi_accumulate_: acc (float32) += sigma * grad, |sigma * grad| or grad^2, skipping and counting
// non-finite gradient entries. One contract for the C++ and the CUDA kernel.
//
// Shapes: rows x cols, every stride in elements and 64 bits wide; the Python layer has checked
// dtypes, devices, overlap and sizes; the CPU kernel checks again.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace safecrit {

enum class Reduction : int { signed_sum = 0, absolute = 1, square = 2 };

struct AccumulateArgs {
    float* acc;
    const void* grad;
    int64_t rows, cols;
    int64_t acc_row_stride, acc_col_stride;
    int64_t grad_row_stride, grad_col_stride;
    float sigma;
    Dtype dtype;
    Reduction reduction;
};

// On the CPU with at most `threads` threads. Returns the number of non-finite gradient entries. Throws
// std::invalid_argument for arguments it cannot run with.
int64_t esi_accumulate_cpu(const AccumulateArgs& args, int threads);

// Name of the instruction set the CPU kernel runs with: "avx512", "avx2" or "plain".
const char* cpu_variant();

// On a CUDA device and stream. Adds the number of non-finite entries to *skipped (device memory); does not
// synchronise. Throws std::runtime_error with CUDA's own text.
void esi_accumulate_cuda(const AccumulateArgs& args, int64_t* skipped, int device, void* stream);

}  // namespace safecrit
