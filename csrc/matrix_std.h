// matrix_std: mean and squared deviations of strided matrices in float64, in a fixed order, from one read.
//
// A matrix is cut into tiles, tiles are joined to at most kMostBlocks blocks; both depend on its size alone, so the
// result does not depend on the number of threads. Tiles and blocks are merged in order by Chan, Golub and LeVeque
// (1983), formula 2.1. The order of a matrix's elements is by descending stride: a transposed view reads as the
// original does.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace safecrit {

// One matrix: elements data[sum(i_d * strides[d])], 0 <= i_d < shape[d].
struct Matrix {
    const void* data;
    std::vector<int64_t> shape, strides;
};

// Unbiased standard deviation of each matrix: 0 with fewer than two elements, NaN with a NaN or infinite one.
// Throws std::invalid_argument for arguments it cannot run with.
std::vector<double> matrix_std_cpu(const std::vector<Matrix>& matrices, Dtype dtype, int threads);

// One matrix on a CUDA device: at most four dimensions after merging. `scratch`: 2 doubles for each of
// matrix_std_cuda_blocks(count), `result`: one double, both in device memory. Does not synchronise.
struct CudaMatrix {
    const void* data;
    int64_t count;
    int64_t shape[4], strides[4];  // the last varies fastest
};
int64_t matrix_std_cuda_blocks(int64_t count);
void matrix_std_cuda(const CudaMatrix& matrix, Dtype dtype, double* scratch, double* result, int device, void* stream);

}  // namespace safecrit
