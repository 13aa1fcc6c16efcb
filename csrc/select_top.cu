// select_top on a CUDA device: one read of the scores, and nothing waits for the device.
//
//     sample     2^18 entries, one from each of as many equal shares      -> a floor, almost surely below the threshold
//     scan       all scores, once: keeps rank and place of the entries    -> `kept`, in order inside a tile; for each
//                above the floor, counts those equal to it, and NaN          tile where they lie and how many they are
//     histogram  kept, three digits of the ranks                          -> the threshold
//     count      kept: above the threshold and equal to it, by tile
//     order      tiles: prefix sums of both                               -> where a tile's indices go, and its ties
//     write      kept                                                     -> indices, ascending
//
// Ranks are those of select_filter.h. A tile keeps its entries where it finds room, which varies; its place in the
// output is a sum over the tiles before it, which does not. Where the threshold is the floor itself, because many
// entries are equal, the tiles that give some of these are read again. Where more is kept than there is room for, or
// the floor is above the threshold, nothing is selected and the result says so. Run again with `exact`, the floor is
// the threshold itself, found by three reads with histograms.
//
// Bytes moved, with N entries of b bytes and 1.1 k of them kept (the sample's margin of four deviations):
//     scan N b + 9 k, histogram 3 x 9 k, count 9 k, write 9 k + 8 k: N b + 62 k, 1.15 reads for 1 % of float32
// Up to one read more where the floor is the threshold; up to six, all told, after a miss.
// Scratch: 8 bytes for each of k + k / 4 + 2^21 entries (of all, if they are fewer), 32 for each tile of 8192 entries.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda_check.h"
#include "select_args.h"
#include "select_scan.cuh"

namespace safecrit {
namespace {

__device__ inline int shift_of(int digit) { return 10 * (kDigits - 1 - digit); }

// One digit of the ranks that share the digits found so far: of all scores, or of `count` kept entries (of as many as
// there are, where it is negative).
template <bool all_scores>
__global__ void __launch_bounds__(kThreads) histogram(Work work, int64_t count, int digit) {
    __shared__ unsigned bins[kBins];
    State& state = *work.state;
    if (digit > 0 && !state.found) return;
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    const uint32_t known = digit > 0 ? state.rank : 0;
    const auto add = [&](uint32_t rank) {
        const int shift = shift_of(digit), upper = digit > 0 ? shift_of(digit - 1) : 31;
        if (rank > kInfinity || rank >> upper != known >> upper) return;
        atomicAdd(&bins[rank >> shift & ((1u << (upper - shift)) - 1u)], 1u);
    };
    if constexpr (all_scores) {
        for (int64_t tile = blockIdx.x; tile < work.tile_count; tile += gridDim.x) {
            const Tensor tensor = tensor_of(work, &Tensor::first_tile, tile);
            const int64_t start = start_of(tensor, tile);
            const int64_t end = start + kTile < tensor.size ? start + kTile : tensor.size;
            for (int64_t i = start + threadIdx.x; i < end; i += kThreads) {
                if (i >= 0) add(rank_at(work, tensor, i));
            }
        }
    } else {
        if (count < 0) count = min(static_cast<int64_t>(state.kept), work.room);
        const int64_t step = int64_t{gridDim.x} * kThreads;
        for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
            add(static_cast<uint32_t>(work.kept[i] >> 32));
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
        if (bins[i] != 0) atomicAdd(&state.bins[i], Counter{bins[i]});
    }
}

// The bin where the entry lies that is the `want`-th from the greatest, and after the last digit what it was for.
__global__ void __launch_bounds__(kThreads) pick(Work work, Counter want, int digit, Goal goal) {
    constexpr int kShare = kBins / kThreads;
    __shared__ Counter sums[kThreads];
    State& state = *work.state;
    Counter* const own = state.bins + threadIdx.x * kShare;
    sums[threadIdx.x] = 0;
    for (int i = 0; i < kShare; ++i) sums[threadIdx.x] += own[i];
    __syncthreads();
    if (threadIdx.x == 0) {
        if (digit == 0) {
            state.want = want;
            state.rank = 0;
            state.found = true;
        }
        int part = kThreads - 1;
        for (; part >= 0 && state.want > sums[part]; --part) state.want -= sums[part];
        if (part < 0) {
            state.found = false;
        } else if (state.found) {
            int bin = part * kShare + kShare - 1;
            for (; state.want > state.bins[bin]; --bin) state.want -= state.bins[bin];
            state.rank |= static_cast<uint32_t>(bin) << shift_of(digit);
            state.here = state.bins[bin];
        }
        if (digit == kDigits - 1) {
            if (goal == Goal::floor) {
                state.floor = state.found ? state.rank : 0;
            } else {
                const Counter k = static_cast<Counter>(work.k);
                const bool is_floor = !state.found;  // all that is kept was taken from `want`
                state.hit = state.kept <= static_cast<Counter>(work.room) && state.kept + state.ties >= k;
                state.threshold = is_floor ? state.floor : state.rank;
                work.result[kHit] = state.hit;
                work.result[kThresholdBits] = (state.threshold - work.shift) ^ work.flip;
                work.result[kTied] = static_cast<int64_t>(is_floor ? state.ties : state.here);
                work.result[kTiedSelected] = static_cast<int64_t>(state.want);
                work.result[kNan] = static_cast<int64_t>(state.nan);
            }
        }
    }
    __syncthreads();
    for (int i = 0; i < kShare; ++i) own[i] = 0;
}

// A warp a tile.
__global__ void __launch_bounds__(kThreads) count(Work work) {
    const State& state = *work.state;
    if (!state.hit) return;
    const int64_t warps = int64_t{gridDim.x} * kWarps;
    for (int64_t number = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; number < work.tile_count; number += warps) {
        Tile& tile = work.tiles[number];
        unsigned above = tile.kept, ties = tile.ties;
        if (state.threshold != state.floor) {
            above = ties = 0;
            for (uint32_t i = threadIdx.x % 32; i < tile.kept; i += 32) {
                const auto rank = static_cast<uint32_t>(work.kept[tile.kept_at + i] >> 32);
                above += rank > state.threshold;
                ties += rank == state.threshold;
            }
            above = __reduce_add_sync(kAll, above);
            ties = __reduce_add_sync(kAll, ties);
        }
        if (threadIdx.x % 32 != 0) continue;
        tile.above = above;
        tile.ties = ties;
        atomicAdd(&work.groups[number / kGroup].above, Counter{above});
        atomicAdd(&work.groups[number / kGroup].ties, Counter{ties});
    }
}

// Sums over the threads before this one, and over all of them.
__device__ inline Sums sums_before(Sums mine, Sums& all) {
    __shared__ Sums shared[kThreads];
    Sums sum = mine;
    for (unsigned step = 1; step < kThreads; step *= 2) {
        shared[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x >= step) {
            sum.above += shared[threadIdx.x - step].above;
            sum.ties += shared[threadIdx.x - step].ties;
        }
        __syncthreads();
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    all = shared[kThreads - 1];
    __syncthreads();
    return {sum.above - mine.above, sum.ties - mine.ties};
}

// A block a group of tiles.
__global__ void __launch_bounds__(kThreads) order(Work work) {
    const State& state = *work.state;
    if (!state.hit) return;
    for (int64_t group = blockIdx.x; group < work.group_count; group += gridDim.x) {
        Sums earlier{0, 0}, all{0, 0}, own{0, 0};
        for (int64_t i = threadIdx.x; i < group; i += kThreads) {
            earlier.above += work.groups[i].above;
            earlier.ties += work.groups[i].ties;
        }
        sums_before(earlier, all);
        const int64_t first = group * kGroup + int64_t{threadIdx.x} * (kGroup / kThreads);
        const int64_t end = min(first + int64_t{kGroup / kThreads}, work.tile_count);
        for (int64_t i = first; i < end; ++i) {
            own.above += work.tiles[i].above;
            own.ties += work.tiles[i].ties;
        }
        Sums unused;
        const Sums before = sums_before(own, unused);
        Counter above = all.above + before.above, ties = all.ties + before.ties;
        for (int64_t i = first; i < end; ++i) {
            Tile& tile = work.tiles[i];
            const Counter left = ties < state.want ? state.want - ties : 0;
            tile.quota = static_cast<uint32_t>(left < tile.ties ? left : tile.ties);
            tile.place = static_cast<int64_t>(above + (ties < state.want ? ties : state.want));
            above += tile.above;
            ties += tile.ties;
        }
    }
}

// A warp a tile; then a thread a tensor.
__global__ void __launch_bounds__(kThreads) write(Work work) {
    const State& state = *work.state;
    if (!state.hit) return;
    const unsigned lane = threadIdx.x % 32, lower = (1u << lane) - 1u;
    const int64_t warps = int64_t{gridDim.x} * kWarps;
    for (int64_t number = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; number < work.tile_count; number += warps) {
        const Tile tile = work.tiles[number];
        const Tensor& tensor = tensor_of(work, &Tensor::first_tile, number);
        const int64_t start = start_of(tensor, number);
        const bool again = state.threshold == state.floor && tile.quota > 0;
        const unsigned entries = again ? kTile : tile.kept;
        int64_t place = tile.place;
        unsigned quota = tile.quota;
        for (unsigned from = 0; from < entries; from += 32) {
            const unsigned i = from + lane;
            int64_t index = start + i;
            uint32_t rank = 0;
            bool valid = i < entries;
            if (again) {
                valid = index >= 0 && index < tensor.size;
                if (valid) rank = rank_at(work, tensor, index);
            } else if (valid) {
                rank = static_cast<uint32_t>(work.kept[tile.kept_at + i] >> 32);
                index = start + static_cast<uint32_t>(work.kept[tile.kept_at + i]);
            }
            const unsigned ties = __ballot_sync(kAll, valid && rank == state.threshold);
            const bool tie = (ties >> lane & 1u) != 0 && static_cast<unsigned>(__popc(ties & lower)) < quota;
            const bool taken = tie || (valid && rank > state.threshold && rank <= kInfinity);
            const unsigned all = __ballot_sync(kAll, taken);
            if (taken) work.out[place + __popc(all & lower)] = index;
            place += __popc(all);
            quota -= min(quota, static_cast<unsigned>(__popc(ties)));
        }
    }
    const auto place_of = [&](int64_t tensor) {
        const int64_t tile = tensor < work.tensor_count ? work.tensors[tensor].first_tile : work.tile_count;
        return tile < work.tile_count ? work.tiles[tile].place : work.k;
    };
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < work.tensor_count; i += step) {
        work.result[kSelectResults + i] = place_of(i + 1) - place_of(i);
    }
}

unsigned blocks(int64_t work, int64_t each, unsigned most = kMaxBlocks) {
    return static_cast<unsigned>(std::clamp<int64_t>((work + each - 1) / each, 1, most));
}

// A launch without its check is no launch.
#define SAFECRIT_LAUNCHED() SAFECRIT_CUDA_CHECK(cudaGetLastError())

template <bool all_scores>
void search(const Work& work, int64_t count, int64_t want, Goal goal, cudaStream_t queue) {
    const unsigned grid = all_scores ? blocks(work.tile_count, 1) : blocks(count < 0 ? work.room : count, kThreads);
    for (int digit = 0; digit < kDigits; ++digit) {
        histogram<all_scores><<<grid, kThreads, 0, queue>>>(work, count, digit);
        SAFECRIT_LAUNCHED();
        pick<<<1, kThreads, 0, queue>>>(work, static_cast<Counter>(want), digit, goal);
        SAFECRIT_LAUNCHED();
    }
}

struct Plan {
    Work work;
    std::vector<Tensor> tensors;
    bool sampled;
    int64_t bytes;
};

// Where everything lies in `scratch`, which may be null where only the size is wanted.
Plan plan(const SelectTopArgs& args, const SelectCudaTuning& tuning, int64_t* result, void* scratch) {
    Plan made{};
    Work& work = made.work;
    work.total = checked_total(args);
    work.k = args.k;
    require(tuning.room == 0 || (tuning.room >= args.k && tuning.room <= kMostBytes / 8), "select_top: bad room");
    require(tuning.place >= 0, "select_top: bad place");
    work.room = tuning.room != 0 ? tuning.room : std::min(work.total, args.k + args.k / 4 + kRoom);
    work.flip = args.largest ? 0 : ~0u;
    work.shift = args.largest ? 0 : kInfinity + 1;
    work.out = args.out;
    work.result = result;
    made.sampled = !tuning.exact && args.k > 0 && work.total > std::max(work.room, kSample);
    int64_t before = 0;
    for (size_t i = 0; i < args.data.size(); ++i) {
        const auto lead = static_cast<int>(reinterpret_cast<uintptr_t>(args.data[i]) % 16) /
                          static_cast<int>(item_size(args.dtypes[i]));
        made.tensors.push_back({args.data[i], args.sizes[i], before, work.tile_count, args.dtypes[i], lead});
        before += args.sizes[i];
        if (args.sizes[i] > 0) work.tile_count += (args.sizes[i] + lead + kTile - 1) / kTile;
    }
    work.tensor_count = static_cast<int64_t>(args.data.size());
    work.group_count = (work.tile_count + kGroup - 1) / kGroup;
    const auto place = [&](auto*& pointer, int64_t count) {
        using Item = std::remove_reference_t<decltype(*pointer)>;
        pointer = reinterpret_cast<Item*>(static_cast<char*>(scratch) + made.bytes);
        made.bytes += (count * static_cast<int64_t>(sizeof(Item)) + 15) / 16 * 16;
    };
    place(work.tensors, work.tensor_count);
    place(work.state, 1);
    place(work.tiles, work.tile_count);
    place(work.groups, work.group_count);
    place(work.kept, made.sampled ? std::max(work.room, kSample) : work.room);
    return made;
}

// Entries of the sample that should rank above the floor.
int64_t usual_place(const Work& work) {
    const double share = static_cast<double>(work.k) / static_cast<double>(work.total);
    const double mean = share * static_cast<double>(kSample);
    return static_cast<int64_t>(std::ceil(mean + 4 * std::sqrt(mean * (1 - share)))) + 8;
}

}  // namespace

int64_t select_top_cuda_scratch(const SelectTopArgs& args, const SelectCudaTuning& tuning) {
    return plan(args, tuning, nullptr, nullptr).bytes;
}

void select_top_cuda(const SelectTopArgs& args, const SelectCudaTuning& tuning, int64_t* result, void* scratch,
                     int device, void* stream) {
    const Plan made = plan(args, tuning, result, scratch);
    const Work& work = made.work;
    check_memories({{"output", args.out, args.k, 8, true},
                    {"result", result, kSelectResults + work.tensor_count, 8, true},
                    {"scratch", scratch, made.bytes, 1, true}});
    require(reinterpret_cast<uintptr_t>(scratch) % 16 == 0, "scratch: misaligned pointer");
    const DeviceGuard guard(device);
    auto* queue = static_cast<cudaStream_t>(stream);
    for (size_t first = 0; first < made.tensors.size(); first += kDescribed) {
        Described some;
        const size_t number = std::min<size_t>(kDescribed, made.tensors.size() - first);
        std::copy_n(made.tensors.begin() + static_cast<std::ptrdiff_t>(first), number, some.tensors);
        describe<<<1, kThreads, 0, queue>>>(some, static_cast<int>(number), work.tensors + first);
        SAFECRIT_LAUNCHED();
    }
    reset<<<1, kThreads, 0, queue>>>(work, args.k == 0 ? kInfinity : 0);
    SAFECRIT_LAUNCHED();
    if (tuning.exact && args.k > 0) {
        search<true>(work, 0, args.k, Goal::floor, queue);
    } else if (made.sampled) {
        sample<<<static_cast<unsigned>(kSample / kThreads), kThreads, 0, queue>>>(work);
        SAFECRIT_LAUNCHED();
        search<false>(work, kSample, tuning.place != 0 ? tuning.place : usual_place(work), Goal::floor, queue);
    }
    scan<<<blocks(work.tile_count, 1, kScanBlocks), kThreads, 0, queue>>>(work);
    SAFECRIT_LAUNCHED();
    search<false>(work, -1, args.k, Goal::threshold, queue);
    count<<<blocks(work.tile_count, kWarps), kThreads, 0, queue>>>(work);
    SAFECRIT_LAUNCHED();
    order<<<blocks(work.group_count, 1), kThreads, 0, queue>>>(work);
    SAFECRIT_LAUNCHED();
    write<<<blocks(work.tile_count, kWarps), kThreads, 0, queue>>>(work);
    SAFECRIT_LAUNCHED();
}

}  // namespace safecrit
