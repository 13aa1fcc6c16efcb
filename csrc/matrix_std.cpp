// The CPU kernel of matrix_std.
//
// Sums of x and x^2 in 24 float64 lanes: a float32's square is exact in float64. Where a tile's mean is large beside
// its deviations, so that the difference would cancel, the tile, which is in cache, is summed again around its mean.
#include "matrix_std.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "check.h"
#include "simd.h"
#include "threads.h"

#if SAFECRIT_X86_VARIANTS
#include <immintrin.h>
#endif

namespace safecrit {
namespace {

// Vectors of two (SSE2, NEON) and of four doubles (AVX2), with the same number of narrower entries.
template <int width>
struct Vectors;

template <>
struct Vectors<2> {
    using Doubles = double __attribute__((vector_size(16)));
    using Floats = float __attribute__((vector_size(8)));
    using Words = uint32_t __attribute__((vector_size(8)));
    using Halves = uint16_t __attribute__((vector_size(4)));
};

template <>
struct Vectors<4> {
    using Doubles = double __attribute__((vector_size(32)));
    using Floats = float __attribute__((vector_size(16)));
    using Words = uint32_t __attribute__((vector_size(16)));
    using Halves = uint16_t __attribute__((vector_size(8)));
};

constexpr int kLanes = 24;              // sums and squares fill 12 of AVX2's 16 registers
constexpr int64_t kTile = 512 * kLanes;  // 48 KiB of float32, a first-level cache
constexpr int64_t kMostBlocks = int64_t{1} << 16;
constexpr int64_t kShortRun = 4 * kLanes;  // below, copying costs less than a call
constexpr int64_t kAhead = 4096;         // bytes; the processor's own prefetching stops at the end of a page
constexpr size_t kMostDims = 64;  // as in torch
constexpr double kCancels = 0.01;  // deviations below this share of the squares: two digits of 16 are lost

// Number of elements, their mean, and the sum of squared deviations from it.
struct Moments {
    int64_t count = 0;
    double mean = 0, squares = 0;

    void add(const Moments& other) {
        if (other.count == 0) return;
        const double delta = other.mean - mean, total = static_cast<double>(count + other.count);
        const double share = static_cast<double>(other.count) / total;
        squares += other.squares + delta * delta * static_cast<double>(count) * share;
        mean += delta * share;
        count += other.count;
    }
};

template <typename Format, typename V>
SAFECRIT_INLINE void load(const typename Format::Storage* from, typename V::Doubles& to) {
    using Floats = typename V::Floats;
    using Words = typename V::Words;
    if constexpr (std::is_same_v<Format, Float32>) {
        Floats values;
        std::memcpy(&values, from, sizeof values);
        to = __builtin_convertvector(values, typename V::Doubles);
    } else {
        typename V::Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        const Words words = __builtin_convertvector(halves, Words);
        if constexpr (std::is_same_v<Format, Bfloat16>) {
            to = __builtin_convertvector(reinterpret_cast<Floats>(words << 16), typename V::Doubles);
        } else {  // as Float16::value; infinities become NaN, which gives the same result
            const Words scale = Words{} + ((127u + 112u) << 23);
            const Floats magnitude = reinterpret_cast<Floats>((words & 0x7fffu) << 13) * reinterpret_cast<Floats>(scale);
            const Words special = reinterpret_cast<Words>((words & 0x7c00u) == 0x7c00u) & 0x7fc00000u;
            const Words bits = reinterpret_cast<Words>(magnitude) | (words & 0x8000u) << 16 | special;
            to = __builtin_convertvector(reinterpret_cast<Floats>(bits), typename V::Doubles);
        }
    }
}

// Sums of x - centre and of its square. Value i goes to lane i % kLanes.
struct Lanes {
    double sums[kLanes] = {}, squares[kLanes] = {};
};

template <typename Format, int width>
SAFECRIT_INLINE void add_lanes(const typename Format::Storage* values, int64_t count, double centre, Lanes& lanes) {
    using Doubles = typename Vectors<width>::Doubles;
    constexpr int kGroups = kLanes / width;
    Doubles sums[kGroups], squares[kGroups];
    std::memcpy(sums, lanes.sums, sizeof sums);
    std::memcpy(squares, lanes.squares, sizeof squares);
    for (int64_t i = 0; i < count; i += kLanes) {
        for (int group = 0; group < kGroups; ++group) {
            Doubles x;
            load<Format, Vectors<width>>(values + i + group * width, x);
            x -= centre;
            sums[group] += x;
            squares[group] += x * x;
        }
    }
    std::memcpy(lanes.sums, sums, sizeof sums);
    std::memcpy(lanes.squares, squares, sizeof squares);
}

template <typename Format>
void lanes_plain(const typename Format::Storage* values, int64_t count, double centre, Lanes& lanes) {
    add_lanes<Format, 2>(values, count, centre, lanes);
}

#if SAFECRIT_X86_VARIANTS
template <typename Format>
SAFECRIT_AVX2 void lanes_avx2(const typename Format::Storage* values, int64_t count, double centre, Lanes& lanes) {
    add_lanes<Format, 4>(values, count, centre, lanes);
}

template <typename Format>
SAFECRIT_AVX512 inline __m512d load_avx512(const typename Format::Storage* from) {
    __m256 values;
    if constexpr (std::is_same_v<Format, Float32>) {
        values = _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    } else {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        values = std::is_same_v<Format, Float16>
                     ? _mm256_cvtph_ps(halves)
                     : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    return _mm512_maskz_cvtps_pd(0xff, values);  // GCC 12 warns of its own header in _mm512_cvtps_pd
}

// By hand: compilers convert eight floats by way of three shuffles. Around zero the squares are exact, so that fused
// multiply-adds give the bits of the other variants.
template <typename Format>
SAFECRIT_AVX512 void lanes_avx512(const typename Format::Storage* values, int64_t count, double centre, Lanes& lanes) {
    if (centre != 0) return add_lanes<Format, 4>(values, count, centre, lanes);
    constexpr int kGroups = kLanes / 8;
    __m512d sums[kGroups], squares[kGroups];
    for (int group = 0; group < kGroups; ++group) {
        sums[group] = _mm512_loadu_pd(lanes.sums + group * 8);
        squares[group] = _mm512_loadu_pd(lanes.squares + group * 8);
    }
    for (int64_t i = 0; i < count; i += kLanes) {
        const char* ahead = reinterpret_cast<const char*>(values + i) + kAhead;
        _mm_prefetch(ahead, _MM_HINT_T0);
        if constexpr (std::is_same_v<Format, Float32>) _mm_prefetch(ahead + 64, _MM_HINT_T0);
        for (int group = 0; group < kGroups; ++group) {
            const __m512d x = load_avx512<Format>(values + i + group * 8);
            sums[group] = _mm512_add_pd(sums[group], x);
            squares[group] = _mm512_fmadd_pd(x, x, squares[group]);
        }
    }
    for (int group = 0; group < kGroups; ++group) {
        _mm512_storeu_pd(lanes.sums + group * 8, sums[group]);
        _mm512_storeu_pd(lanes.squares + group * 8, squares[group]);
    }
}
#else
template <typename Format>
constexpr auto lanes_avx2 = lanes_plain<Format>, lanes_avx512 = lanes_plain<Format>;
#endif

// A checked matrix, its dimensions by descending stride and merged where they follow one another.
struct Walk {
    const char* data;
    std::vector<int64_t> shape, strides;
    int64_t count = 1;

    Walk(const Matrix& matrix, int64_t item) : data(static_cast<const char*>(matrix.data)) {
        require(matrix.shape.size() == matrix.strides.size(), "as many strides as sizes are needed");
        require(matrix.shape.size() <= kMostDims, "more than 64 dimensions");
        for (const int64_t size : matrix.shape) require(size >= 0, "negative size or stride");
        int64_t reach = 1;
        for (size_t d = 0; d < matrix.shape.size(); ++d) {
            count = matrix.shape[d] == 0 ? 0 : checked_product(count, matrix.shape[d]);
            reach += checked_product(std::max<int64_t>(matrix.shape[d] - 1, 0), matrix.strides[d]);
            require(reach <= kMostBytes, "sizes and strides are too large");
        }
        check_memory({"weight", matrix.data, count == 0 ? 0 : reach, item, false});
        std::vector<size_t> order(matrix.shape.size());
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return matrix.strides[a] > matrix.strides[b]; });
        for (const size_t d : order) {
            if (matrix.shape[d] == 1) continue;
            if (!shape.empty() && strides.back() == matrix.shape[d] * matrix.strides[d]) {
                shape.back() *= matrix.shape[d];
                strides.back() = matrix.strides[d];
            } else {
                shape.push_back(matrix.shape[d]);
                strides.push_back(matrix.strides[d]);
            }
        }
        if (shape.empty()) {
            shape.push_back(count);
            strides.push_back(1);
        }
    }

    // Calls body(items, stride, count) on the runs that elements [begin, begin + size) consist of.
    template <typename Item, typename Body>
    void runs(int64_t begin, int64_t size, const Body& body) const {
        const auto* items = reinterpret_cast<const Item*>(data);
        const size_t last = shape.size() - 1;
        std::array<int64_t, kMostDims> place;
        int64_t rest = begin, offset = 0;
        for (size_t d = shape.size(); d-- > 0; rest /= shape[d]) {
            place[d] = rest % shape[d];
            offset += place[d] * strides[d];
        }
        for (int64_t done = 0; done < size;) {
            const int64_t run = std::min(shape[last] - place[last], size - done);
            body(items + offset, strides[last], run);
            done += run;
            place[last] += run;
            offset += run * strides[last];
            for (size_t d = last; d > 0 && place[d] == shape[d]; --d) {
                offset += strides[d - 1] - shape[d] * strides[d];
                place[d] = 0;
                ++place[d - 1];
            }
        }
    }
};

// Sums over elements [begin, begin + size) of a matrix, at most kTile: of runs side by side, all but what exceeds a
// multiple of kLanes from where they lie; the rest from `buffer`, where it is collected.
template <typename Format>
void sums(const Walk& walk, int64_t begin, int64_t size, double centre, void* buffer, double& sum, double& square) {
    using Item = typename Format::Storage;
    using AddLanes = void (*)(const Item*, int64_t, double, Lanes&);
    const auto add = pick_variant<AddLanes>(lanes_plain<Format>, lanes_avx2<Format>, lanes_avx512<Format>);
    Lanes lanes;
    auto* kept = static_cast<Item*>(buffer);
    int64_t collected = 0;
    walk.runs<Item>(begin, size, [&](const Item* items, int64_t stride, int64_t count) {
        const int64_t whole = stride == 1 && count >= kShortRun ? count - count % kLanes : 0;
        if (whole > 0) add(items, whole, centre, lanes);
        for (int64_t i = whole; i < count; ++i) kept[collected++] = items[i * stride];
    });
    const int64_t whole = collected - collected % kLanes;
    add(kept, whole, centre, lanes);
    sum = square = 0;
    for (int64_t i = whole; i < collected; ++i) {
        const double x = static_cast<double>(Format::load(kept[i])) - centre;
        sum += x;
        square += x * x;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        sum += lanes.sums[lane];
        square += lanes.squares[lane];
    }
}

template <typename Format>
Moments tile(const Walk& walk, int64_t begin, int64_t count, void* buffer) {
    const double size = static_cast<double>(count);
    double sum, square;
    sums<Format>(walk, begin, count, 0, buffer, sum, square);
    const double squares = square - sum / size * sum;
    if (squares > kCancels * square) return {count, sum / size, squares};
    const double centre = sum / size;
    sums<Format>(walk, begin, count, centre, buffer, sum, square);
    const double again = square - sum / size * sum;
    return {count, centre + sum / size, again < 0 ? 0 : again};
}

using Tile = Moments (*)(const Walk&, int64_t, int64_t, void*);

Tile pick(Dtype dtype) {
    switch (dtype) {
        case Dtype::bfloat16: return tile<Bfloat16>;
        case Dtype::float16: return tile<Float16>;
        case Dtype::float32: break;
    }
    return tile<Float32>;
}

// Tiles [begin, end) of one matrix.
struct Block {
    const Walk* walk;
    int64_t begin, end;
};

Moments moments(const Block& block, Tile kernel, void* buffer) {
    Moments found;
    for (int64_t start = block.begin * kTile; start < std::min(block.end * kTile, block.walk->count); start += kTile) {
        found.add(kernel(*block.walk, start, std::min(kTile, block.walk->count - start), buffer));
    }
    return found;
}

}  // namespace

std::vector<double> matrix_std_cpu(const std::vector<Matrix>& matrices, Dtype dtype, int threads) {
    check_dtype(static_cast<int>(dtype));
    check_threads(threads);
    std::vector<Walk> walks;
    walks.reserve(matrices.size());
    for (const Matrix& matrix : matrices) walks.emplace_back(matrix, item_size(dtype));
    std::vector<Block> blocks;
    int64_t total = 0;
    for (const Walk& walk : walks) {
        const int64_t tiles = (walk.count + kTile - 1) / kTile, length = (tiles + kMostBlocks - 1) / kMostBlocks;
        for (int64_t begin = 0; begin < tiles; begin += length) blocks.push_back({&walk, begin, begin + length});
        total += walk.count;
    }
    const Tile kernel = pick(dtype);
    std::vector<Moments> found(blocks.size());
    const auto count = static_cast<int64_t>(blocks.size());
    // Each part needs a buffer, made here, where running out of memory can be reported.
    const int parts = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(count, 1)));
    std::vector<uint32_t> buffers(static_cast<size_t>(parts) * kTile);
    parallel_for(count, total / std::max<int64_t>(count, 1), parts, [&](int64_t begin, int64_t end, int part) {
        for (int64_t i = begin; i < end; ++i) {
            const auto at = static_cast<size_t>(i);
            found[at] = moments(blocks[at], kernel, buffers.data() + static_cast<size_t>(part) * kTile);
        }
    });
    std::vector<double> result;
    size_t next = 0;
    for (const Walk& walk : walks) {
        Moments all;
        for (; next < blocks.size() && blocks[next].walk == &walk; ++next) all.add(found[next]);
        result.push_back(all.count < 2 ? 0.0 : std::sqrt(all.squares / static_cast<double>(all.count - 1)));
    }
    return result;
}

}  // namespace safecrit
