// The first half of select_top.cu: what its kernels share, the sample, and the one read of the scores.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "select_top.h"

namespace safecrit {
namespace {

using Counter = unsigned long long;

constexpr uint32_t kInfinity = 0x7f800000u;  // bits of float32 infinity; a greater rank is a NaN's
constexpr unsigned kAll = 0xffffffffu;       // lanes of a warp
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 8192, kEach = kTile / kThreads;  // entries of a tile, and of one thread: bits of a word
constexpr int kGroup = 4 * kThreads;                   // tiles whose counts are added up
constexpr unsigned kMaxBlocks = 132 * 8;               // 8 blocks on each of an H200's 132 multiprocessors
constexpr unsigned kScanBlocks = 1 << 16;              // fewer fit there: so many that the last ones end together
constexpr int64_t kSample = int64_t{1} << 18;
constexpr int64_t kRoom = int64_t{1} << 21;
constexpr int kDigits = 3, kBins = 2048;  // digits of 11, 10 and 10 bits
constexpr int kDescribed = 100;           // tensors in the parameters of one launch, at most 4 KiB

struct Tensor {
    const void* data;
    int64_t size, before, first_tile;  // before: entries of the tensors before it
    Dtype dtype;
    int lead;  // entries between the 16-byte boundary where its first tile starts and its own start
};

struct Described {
    Tensor tensors[kDescribed];
};

struct Tile {
    int64_t kept_at, place;             // of its first entry in `kept`, of its first index in the output
    uint32_t kept, above, ties, quota;  // entries kept, above the threshold, equal to it, of these to be selected
};

struct Sums {
    Counter above, ties;
};

// want, rank, here and found are of a search: after the last digit the rank is the answer, `here` entries have it, and
// `want` of them belong to those looked for.
struct State {
    Counter kept, ties, nan, want, here;
    uint32_t floor, rank, threshold;
    bool found, hit;
    Counter bins[kBins];
};

struct Work {
    Tensor* tensors;
    State* state;
    Tile* tiles;
    Sums* groups;
    uint64_t* kept;  // rank << 32 | place in the tile
    int64_t *out, *result;
    int64_t tensor_count, tile_count, group_count, total, k, room;
    uint32_t flip, shift;  // a rank is (bits of |x| ^ flip) + shift
};

enum class Goal { floor, threshold };

template <Dtype dtype>
__device__ inline uint32_t magnitude(uint32_t bits) {  // bits of |x| in float32
    if constexpr (dtype == Dtype::float32) return bits & 0x7fffffffu;
    if constexpr (dtype == Dtype::bfloat16) return (bits & 0x7fffu) << 16;
    return __float_as_uint(__half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0x7fffu))));
}

__device__ inline uint32_t load_bits(const Tensor& tensor, int64_t i) {
    if (tensor.dtype == Dtype::float32) return __ldg(static_cast<const unsigned*>(tensor.data) + i);
    return __ldg(static_cast<const unsigned short*>(tensor.data) + i);
}

__device__ inline uint32_t rank_at(const Work& work, const Tensor& tensor, int64_t i) {
    uint32_t bits = load_bits(tensor, i);
    switch (tensor.dtype) {
        case Dtype::float32: bits = magnitude<Dtype::float32>(bits); break;
        case Dtype::bfloat16: bits = magnitude<Dtype::bfloat16>(bits); break;
        case Dtype::float16: bits = magnitude<Dtype::float16>(bits); break;
    }
    return (bits ^ work.flip) + work.shift;
}

// The tensor that holds tile or entry `value`. Empty tensors share their `key` with the next one that is not.
__device__ inline const Tensor& tensor_of(const Work& work, int64_t Tensor::*key, int64_t value) {
    int64_t low = 0, high = work.tensor_count - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (work.tensors[middle].*key <= value) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return work.tensors[low];
}

// Index of a tile's place 0; before the tensor's start for its first tile.
__device__ inline int64_t start_of(const Tensor& tensor, int64_t tile) {
    return (tile - tensor.first_tile) * kTile - tensor.lead;
}

__global__ void __launch_bounds__(kThreads) describe(Described some, int count, Tensor* tensors) {
    for (int i = threadIdx.x; i < count; i += kThreads) tensors[i] = some.tensors[i];
}

__global__ void __launch_bounds__(kThreads) reset(Work work, uint32_t floor) {
    State& state = *work.state;
    for (int i = threadIdx.x; i < kBins; i += kThreads) state.bins[i] = 0;
    for (int64_t i = threadIdx.x; i < work.group_count; i += kThreads) work.groups[i] = {0, 0};
    for (int64_t i = threadIdx.x; i < kSelectResults + work.tensor_count; i += kThreads) work.result[i] = 0;
    if (threadIdx.x == 0) {
        state.kept = state.ties = state.nan = 0;
        state.floor = floor;
        state.hit = false;
    }
}

__global__ void __launch_bounds__(kThreads) sample(Work work) {
    const int64_t share = work.total / kSample, rest = work.total % kSample;
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    uint64_t hash = static_cast<uint64_t>(i) + 1;  // the finaliser of SplitMix64
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    const auto jitter = static_cast<int64_t>((hash ^ (hash >> 31)) % static_cast<uint64_t>(share));
    const int64_t entry = i * share + i * rest / kSample + jitter;
    const Tensor& tensor = tensor_of(work, &Tensor::before, entry);
    work.kept[i] = static_cast<uint64_t>(rank_at(work, tensor, entry - tensor.before)) << 32;
}

// Of the 32 entries of this lane from place `base` of a tile on: a bit for each whose rank is at least `floor`. The
// warp reads rows of 32 vectors of 16 bytes; bit row * kVector + v is entry v of the lane's vector.
template <Dtype dtype>
__device__ inline uint32_t candidates(const Work& work, const Tensor& tensor, int64_t base, uint32_t floor) {
    constexpr int kVector = dtype == Dtype::float32 ? 4 : 8, kRows = kEach / kVector, kBits = 128 / kVector;
    const int64_t first = base + int64_t{threadIdx.x % 32} * kVector;
    uint32_t high = 0;
    if (base < 0 || base + 32 * kEach > tensor.size) {  // the tensor's first or last part
#pragma unroll 1
        for (int bit = 0; bit < kEach; ++bit) {
            const int64_t i = first + bit / kVector * 32 * kVector + bit % kVector;
            if (i >= 0 && i < tensor.size && rank_at(work, tensor, i) >= floor) high |= 1u << bit;
        }
        return high;
    }
    const auto* data = reinterpret_cast<const uint4*>(static_cast<const char*>(tensor.data) + first * (kBits / 8));
    uint4 vectors[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) vectors[row] = __ldg(data + row * 32);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const uint32_t words[4] = {vectors[row].x, vectors[row].y, vectors[row].z, vectors[row].w};
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
            const uint32_t bits = magnitude<dtype>(words[v * kBits / 32] >> (v * kBits % 32));
            if ((bits ^ work.flip) + work.shift >= floor) high |= 1u << (row * kVector + v);
        }
    }
    return high;
}

// What one tile keeps. Every warp has kEach * 32 places of it.
__device__ inline void scan_tile(const Work& work, int64_t number, unsigned& nan) {
    __shared__ uint32_t warp_kept[kWarps], warp_ties[kWarps];
    __shared__ int64_t kept_at;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t floor = work.state->floor;
    const Tensor tensor = tensor_of(work, &Tensor::first_tile, number);
    const int part = static_cast<int>(warp) * 32 * kEach;
    const int64_t start = start_of(tensor, number), base = start + part;
    const int vector = tensor.dtype == Dtype::float32 ? 4 : 8, rows = kEach / vector, field = 64 / rows;
    const auto place_of = [&](int bit) {
        return part + (bit / vector * 32 + static_cast<int>(lane)) * vector + bit % vector;
    };

    uint32_t kept = 0;
    switch (tensor.dtype) {
        case Dtype::float32: kept = candidates<Dtype::float32>(work, tensor, base, floor); break;
        case Dtype::bfloat16: kept = candidates<Dtype::bfloat16>(work, tensor, base, floor); break;
        case Dtype::float16: kept = candidates<Dtype::float16>(work, tensor, base, floor); break;
    }
    unsigned ties = 0;
#pragma unroll 1
    for (uint32_t left = kept; left != 0; left &= left - 1) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        const uint32_t rank = rank_at(work, tensor, start + place_of(bit));
        if (rank > floor && rank <= kInfinity) continue;
        kept &= ~(1u << bit);
        if (rank == floor) {
            ++ties;
        } else {
            ++nan;
        }
    }

    // The rows' counts side by side in one word: a row of a warp holds at most 128 entries in 8 bits, or 256 in 16.
    uint64_t mine = 0;
    for (int row = 0; row < rows; ++row) {
        const uint32_t own = kept >> (row * vector) & ((1u << vector) - 1u);
        mine |= static_cast<uint64_t>(__popc(own)) << (row * field);
    }
    uint64_t sum = mine;
    for (unsigned step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(kAll, sum, step);
        if (lane >= step) sum += other;
    }
    const uint64_t rows_kept = __shfl_sync(kAll, sum, 31), before = sum - mine;
    const uint32_t all_kept = __reduce_add_sync(kAll, static_cast<unsigned>(__popc(kept)));
    const uint32_t all_ties = __reduce_add_sync(kAll, ties);
    if (lane == 0) {
        warp_kept[warp] = all_kept;
        warp_ties[warp] = all_ties;
    }
    __syncthreads();
    uint32_t place = 0, tile_kept = 0, tile_ties = 0;
    for (unsigned w = 0; w < kWarps; ++w) {
        if (w == warp) place = tile_kept;
        tile_kept += warp_kept[w];
        tile_ties += warp_ties[w];
    }
    if (threadIdx.x == 0) {
        kept_at = static_cast<int64_t>(atomicAdd(&work.state->kept, Counter{tile_kept}));
        if (tile_ties != 0) atomicAdd(&work.state->ties, Counter{tile_ties});
        work.tiles[number] = {kept_at, 0, tile_kept, 0, tile_ties, 0};
    }
    __syncthreads();
    if (kept_at + tile_kept > work.room) return;
    const uint64_t field_mask = (uint64_t{1} << field) - 1;
    for (int row = 0; row < rows; ++row) {
        int64_t at = kept_at + place + static_cast<int64_t>(before >> (row * field) & field_mask);
#pragma unroll 1
        for (uint32_t left = kept >> (row * vector) & ((1u << vector) - 1u); left != 0; left &= left - 1) {
            const int within = place_of(row * vector + __ffs(static_cast<int>(left)) - 1);
            const uint64_t rank = rank_at(work, tensor, start + within);
            work.kept[at++] = rank << 32 | static_cast<uint64_t>(within);
        }
        place += static_cast<uint32_t>(rows_kept >> (row * field) & field_mask);
    }
}

// At least 5 blocks fit a multiprocessor's registers.
__global__ void __launch_bounds__(kThreads, 5) scan(Work work) {
    unsigned nan = 0;
    for (int64_t tile = blockIdx.x; tile < work.tile_count; tile += gridDim.x) scan_tile(work, tile, nan);
    nan = __reduce_add_sync(kAll, nan);
    if (nan != 0 && threadIdx.x % 32 == 0) atomicAdd(&work.state->nan, Counter{nan});
}

}  // namespace
}  // namespace safecrit
