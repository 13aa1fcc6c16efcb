// The CUDA kernel of matrix_std: blocks of a fixed number of elements, summed in float64 around their first element,
// then merged in order by one more block. The first element lies at most sqrt(n) deviations from the mean of its n
// elements, so the difference of sums loses at most a factor n of float64's accuracy.
#include <cuda_runtime.h>

#include "cuda_check.h"
#include "cuda_load.h"
#include "matrix_std.h"

namespace safecrit {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLeast = int64_t{1} << 15;       // elements of a block
constexpr int64_t kMostBlocks = int64_t{1} << 14;  // blocks grow beyond that many

int64_t block_size(int64_t count) {
    const int64_t wanted = (count + kMostBlocks - 1) / kMostBlocks;
    return wanted < kLeast ? kLeast : wanted;
}

struct Moments {
    double count, mean, squares;
};

// Chan, Golub and LeVeque (1983), formula 2.1.
__device__ inline Moments merge(const Moments& left, const Moments& right) {
    if (right.count == 0) return left;
    if (left.count == 0) return right;
    const double delta = right.mean - left.mean, total = left.count + right.count, share = right.count / total;
    return {total, left.mean + delta * share, left.squares + right.squares + delta * delta * left.count * share};
}

// Merges what the threads of a block hold, neighbours first; the result is thread 0's.
__device__ inline Moments merge_block(Moments mine) {
    __shared__ Moments shared[kThreads];
    shared[threadIdx.x] = mine;
    for (int step = 1; step < kThreads; step *= 2) {
        __syncthreads();
        if (threadIdx.x % (2 * step) == 0) shared[threadIdx.x] = merge(shared[threadIdx.x], shared[threadIdx.x + step]);
    }
    return shared[0];
}

__device__ inline double element(const CudaMatrix& matrix, Dtype dtype, int64_t i) {
    int64_t offset = 0;
    if (matrix.count == matrix.shape[3]) {
        offset = i * matrix.strides[3];
    } else {
        for (int d = 3; d >= 0; --d) {
            offset += i % matrix.shape[d] * matrix.strides[d];
            i /= matrix.shape[d];
        }
    }
    return static_cast<double>(load_float(matrix.data, dtype, offset));
}

__global__ void __launch_bounds__(kThreads) block_moments(CudaMatrix matrix, Dtype dtype, int64_t size, double* out) {
    const int64_t begin = blockIdx.x * size;
    const int64_t end = begin + size < matrix.count ? begin + size : matrix.count;
    const double centre = element(matrix, dtype, begin);
    double count = 0, sum = 0, square = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const double x = element(matrix, dtype, i) - centre;
        count += 1;
        sum += x;
        square += x * x;
    }
    // Only the sums of the whole block are subtracted from one another: those of one thread may lie far from `centre`.
    __shared__ double sums[kThreads], squares[kThreads], counts[kThreads];
    sums[threadIdx.x] = sum;
    squares[threadIdx.x] = square;
    counts[threadIdx.x] = count;
    for (int step = kThreads / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) {
            sums[threadIdx.x] += sums[threadIdx.x + step];
            squares[threadIdx.x] += squares[threadIdx.x + step];
            counts[threadIdx.x] += counts[threadIdx.x + step];
        }
    }
    if (threadIdx.x == 0) {
        const double deviations = squares[0] - sums[0] / counts[0] * sums[0];
        out[2 * blockIdx.x] = centre + sums[0] / counts[0];
        out[2 * blockIdx.x + 1] = deviations < 0 ? 0 : deviations;  // NaN stays NaN
    }
}

__global__ void __launch_bounds__(kThreads) merge_blocks(const double* partial, int64_t blocks, int64_t size,
                                                        int64_t total, double* result) {
    const int64_t each = (blocks + kThreads - 1) / kThreads, begin = threadIdx.x * each;
    Moments mine{0, 0, 0};
    for (int64_t i = begin; i < begin + each && i < blocks; ++i) {
        const int64_t count = i + 1 < blocks ? size : total - i * size;
        mine = merge(mine, {static_cast<double>(count), partial[2 * i], partial[2 * i + 1]});
    }
    const Moments all = merge_block(mine);
    if (threadIdx.x == 0) *result = sqrt(all.squares / (all.count - 1));
}

}  // namespace

int64_t matrix_std_cuda_blocks(int64_t count) {
    const int64_t size = block_size(count);
    return (count + size - 1) / size;
}

void matrix_std_cuda(const CudaMatrix& matrix, Dtype dtype, double* scratch, double* result, int device, void* stream) {
    const DeviceGuard guard(device);
    auto* queue = static_cast<cudaStream_t>(stream);
    if (matrix.count < 2) {
        SAFECRIT_CUDA_CHECK(cudaMemsetAsync(result, 0, sizeof *result, queue));
        return;
    }
    const int64_t size = block_size(matrix.count), blocks = matrix_std_cuda_blocks(matrix.count);
    block_moments<<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(matrix, dtype, size, scratch);
    SAFECRIT_CUDA_CHECK(cudaGetLastError());
    merge_blocks<<<1, kThreads, 0, queue>>>(scratch, blocks, size, matrix.count, result);
    SAFECRIT_CUDA_CHECK(cudaGetLastError());
}

}  // namespace safecrit
