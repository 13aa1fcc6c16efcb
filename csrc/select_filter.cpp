// The filter on AVX-512, AVX2 and the base instruction set, picked at run time.
//
// All of them are free of branches on the data: every vector is compacted in a register and stored whole, and only
// the place where the next one goes depends on what was found. (AVX-512's compacting store is not used: it is
// microcoded on AMD's processors.)
//
// Entries of 16 bits are compared as they are, with the floor translated, and only the vectors in which one is high
// enough are noted, widened and compacted: few, where few are selected.
#include "select_filter.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__)
#define SAFECRIT_X86_VARIANTS 1
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false, inside GCC 12's own AVX-512 header
#endif
#include <immintrin.h>
#else
#define SAFECRIT_X86_VARIANTS 0
#endif

namespace safecrit {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kHalfBias = 112u << 23;  // between the exponents of float16 (15) and float32 (127)

uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Bits of |x| in float32. float16 is widened without arithmetic on subnormals, which torch may have switched off.
inline uint32_t magnitude32(uint32_t bits) { return bits & kMagnitude; }
inline uint32_t magnitude_bfloat16(uint32_t bits) { return (bits & 0x7fffu) << 16; }
inline uint32_t magnitude_float16(uint32_t bits) {
    bits &= 0x7fffu;
    if (bits < 0x400u) return float_bits(static_cast<float>(bits) * 0x1p-24f);
    return (bits << 13) + (bits < 0x7c00u ? kHalfBias : 2 * kHalfBias);
}

// The bits of |x| in 16 bits sort like |x| too. A short rank is these bits where the largest are selected, and
// kShortInfinity minus these bits where the smallest are; NaN are above kShortInfinity again.
template <Dtype dtype>
constexpr uint32_t kShortInfinity = dtype == Dtype::bfloat16 ? 0x7f80u : 0x7c00u;

// The least bits of |x| in 16 bits that are at least `bits` in float32; kShortInfinity + 1 above infinity.
template <Dtype dtype>
uint32_t shorten(uint32_t bits) {
    if (bits > kInfinity) return kShortInfinity<dtype> + 1;
    if constexpr (dtype == Dtype::bfloat16) return (bits + 0xffffu) >> 16;
    constexpr uint32_t kNormal = 113u << 23;                    // 2^-14
    constexpr uint32_t kLeast = 103u << 23;                     // 2^-24
    if (bits <= kLeast) return bits > 0 ? 1 : 0;
    if (bits >= kNormal) return std::min((bits - kHalfBias + 0x1fffu) >> 13, 0x7c00u);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<uint32_t>(std::ceil(value * 0x1p24f));
}

// The least short rank whose entry has at least this rank; kShortInfinity + 1 where only NaN have.
template <Dtype dtype>
uint32_t short_rank(uint32_t rank, bool largest) {
    return largest ? shorten<dtype>(rank) : kShortInfinity<dtype> + 1 - shorten<dtype>(kInfinity + 1 - rank);
}

template <Dtype dtype, bool count_ties>
int filter_plain(const void* data, int count, bool largest, uint32_t floor, uint32_t* positions, uint32_t* ranks,
                 int64_t* ties) {
    int found = 0, equal = 0;
    for (int i = 0; i < count; ++i) {
        uint32_t rank;
        if constexpr (dtype == Dtype::float32) rank = magnitude32(static_cast<const uint32_t*>(data)[i]);
        if constexpr (dtype == Dtype::bfloat16) rank = magnitude_bfloat16(static_cast<const uint16_t*>(data)[i]);
        if constexpr (dtype == Dtype::float16) rank = magnitude_float16(static_cast<const uint16_t*>(data)[i]);
        if (!largest) rank = kInfinity - rank;
        positions[found] = static_cast<uint32_t>(i);
        ranks[found] = rank;
        found += rank >= floor ? 1 : 0;
        if constexpr (count_ties) equal += rank == floor - 1 ? 1 : 0;
    }
    *ties += equal;
    return found;
}

#if SAFECRIT_X86_VARIANTS

#define SAFECRIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt")))
#define SAFECRIT_AVX2 __attribute__((target("avx2,popcnt")))

constexpr int64_t kAhead = 4096;  // bytes

// Asks for what is read `kAhead` from here; past the end it does nothing.
template <Dtype dtype>
inline void prefetch(const void* data, int i) {
    _mm_prefetch(static_cast<const char*>(data) + i * item_size(dtype) + kAhead, _MM_HINT_T0);
}

// Sixteen entries as float32 bits of |x|; of a last vector only the `lanes` that exist are read.
template <Dtype dtype>
SAFECRIT_AVX512 inline __m512i magnitude_avx512(const void* data, int i, __mmask16 lanes) {
    if constexpr (dtype == Dtype::float32) {
        const __m512i bits = _mm512_maskz_loadu_epi32(lanes, static_cast<const uint32_t*>(data) + i);
        return _mm512_and_si512(bits, _mm512_set1_epi32(kMagnitude));
    } else {
        const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(data) + i);
        if constexpr (dtype == Dtype::bfloat16) {
            const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
            return _mm512_and_si512(bits, _mm512_set1_epi32(kMagnitude));
        } else {
            const __m512i bits = _mm512_and_si512(_mm512_cvtepu16_epi32(half), _mm512_set1_epi32(0x7fff));
            const __mmask16 special = _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(0x7c00));
            const __mmask16 subnormal = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(0x400));
            const __m512i bias = _mm512_set1_epi32(kHalfBias);
            __m512i wide = _mm512_add_epi32(_mm512_slli_epi32(bits, 13), bias);
            wide = _mm512_mask_add_epi32(wide, special, wide, bias);
            const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(0x1p-24f));
            return _mm512_mask_mov_epi32(wide, subnormal, _mm512_castps_si512(small));
        }
    }
}

// Ranks of sixteen entries: kInfinity - bits is ~bits + (kInfinity + 1), one form for both directions.
SAFECRIT_AVX512 inline __m512i rank_avx512(__m512i bits, bool largest) {
    const __m512i rank = _mm512_xor_si512(bits, _mm512_set1_epi32(largest ? 0 : -1));
    return _mm512_add_epi32(rank, _mm512_set1_epi32(largest ? 0 : static_cast<int>(kInfinity + 1)));
}

// Writes position and rank of those of the entries from i on that are in `high`; returns their number.
SAFECRIT_AVX512 inline int keep_avx512(__mmask16 high, int i, __m512i rank, uint32_t* positions, uint32_t* ranks) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i position = _mm512_add_epi32(lane, _mm512_set1_epi32(i));
    _mm512_storeu_si512(positions, _mm512_maskz_compress_epi32(high, position));
    _mm512_storeu_si512(ranks, _mm512_maskz_compress_epi32(high, rank));
    return __builtin_popcount(high);
}

template <bool count_ties>
SAFECRIT_AVX512 int filter32_avx512(const void* data, int count, bool largest, uint32_t floor, uint32_t* positions,
                                    uint32_t* ranks, int64_t* ties) {
    const __m512i least = _mm512_set1_epi32(static_cast<int>(floor));
    const __m512i tied = _mm512_set1_epi32(static_cast<int>(floor - 1));
    int found = 0, equal = 0;
    for (int i = 0; i < count; i += 16) {
        const auto lanes = static_cast<__mmask16>(count - i < 16 ? (1 << (count - i)) - 1 : 0xffff);
        prefetch<Dtype::float32>(data, i);
        const __m512i rank = rank_avx512(magnitude_avx512<Dtype::float32>(data, i, lanes), largest);
        const __mmask16 high = _mm512_mask_cmpge_epu32_mask(lanes, rank, least);
        found += keep_avx512(high, i, rank, positions + found, ranks + found);
        if constexpr (count_ties) equal += __builtin_popcount(_mm512_mask_cmpeq_epu32_mask(lanes, rank, tied));
    }
    *ties += equal;
    return found;
}

template <Dtype dtype, bool count_ties>
SAFECRIT_AVX512 int filter16_avx512(const void* data, int count, bool largest, uint32_t floor, uint32_t* positions,
                                    uint32_t* ranks, int64_t* ties) {
    const uint32_t floor16 = short_rank<dtype>(floor, largest);
    const uint32_t tied16 = count_ties ? short_rank<dtype>(floor - 1, largest) : floor16;
    const __m512i flip = _mm512_set1_epi16(largest ? 0 : -1);
    const __m512i offset = _mm512_set1_epi16(static_cast<int16_t>(largest ? 0 : kShortInfinity<dtype> + 1));
    const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(floor16));
    const __m512i tied = _mm512_set1_epi16(static_cast<int16_t>(tied16));
    __mmask32 masks[kBlock / 32];
    int starts[kBlock / 32];
    int vectors = 0, found = 0, equal = 0;
    for (int i = 0; i < count; i += 32) {
        const auto lanes = static_cast<__mmask32>(count - i < 32 ? (1u << (count - i)) - 1 : ~0u);
        prefetch<dtype>(data, i);
        const __m512i entries = _mm512_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(data) + i);
        const __m512i bits = _mm512_and_si512(entries, _mm512_set1_epi16(0x7fff));
        const __m512i rank = _mm512_add_epi16(_mm512_xor_si512(bits, flip), offset);
        const __mmask32 high = _mm512_mask_cmpge_epu16_mask(lanes, rank, least);
        masks[vectors] = high;
        starts[vectors] = i;
        vectors += high != 0 ? 1 : 0;
        if constexpr (count_ties) equal += __builtin_popcount(_mm512_mask_cmpeq_epu16_mask(lanes, rank, tied));
    }
    for (int v = 0; v < vectors; ++v) {
        for (int half = 0; half < 32; half += 16) {
            const auto high = static_cast<__mmask16>(masks[v] >> half);
            const int i = starts[v] + half;
            const __m512i rank = rank_avx512(magnitude_avx512<dtype>(data, i, high), largest);
            found += keep_avx512(high, i, rank, positions + found, ranks + found);
        }
    }
    *ties += tied16 < floor16 ? equal : 0;  // else no entry has rank floor - 1
    return found;
}

// For each of the 256 patterns of 8 lanes, the lanes that are set, in order.
struct Compaction {
    alignas(32) uint32_t lanes[256][8];
};

constexpr Compaction make_compaction() {
    Compaction table{};
    for (int pattern = 0; pattern < 256; ++pattern) {
        int place = 0;
        for (uint32_t lane = 0; lane < 8; ++lane) {
            if (pattern >> lane & 1) table.lanes[pattern][place++] = lane;
        }
    }
    return table;
}

constexpr Compaction kCompaction = make_compaction();

template <Dtype dtype>
SAFECRIT_AVX2 inline __m256i magnitude_avx2(const void* data, int i) {
    if constexpr (dtype == Dtype::float32) {
        const __m256i bits = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(static_cast<const uint32_t*>(data) + i));
        return _mm256_and_si256(bits, _mm256_set1_epi32(kMagnitude));
    } else {
        const __m128i half = _mm_loadu_si128(
            reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + i));
        const __m256i bits = _mm256_and_si256(_mm256_cvtepu16_epi32(half), _mm256_set1_epi32(0x7fff));
        if constexpr (dtype == Dtype::bfloat16) return _mm256_slli_epi32(bits, 16);
        const __m256i special = _mm256_cmpgt_epi32(bits, _mm256_set1_epi32(0x7bff));
        const __m256i subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x400), bits);
        const __m256i bias = _mm256_set1_epi32(kHalfBias);
        __m256i wide = _mm256_add_epi32(_mm256_slli_epi32(bits, 13), bias);
        wide = _mm256_add_epi32(wide, _mm256_and_si256(special, bias));
        const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(bits), _mm256_set1_ps(0x1p-24f));
        return _mm256_blendv_epi8(wide, _mm256_castps_si256(small), subnormal);
    }
}

SAFECRIT_AVX2 inline __m256i rank_avx2(__m256i bits, bool largest) {
    const __m256i rank = _mm256_xor_si256(bits, _mm256_set1_epi32(largest ? 0 : -1));
    return _mm256_add_epi32(rank, _mm256_set1_epi32(largest ? 0 : static_cast<int>(kInfinity + 1)));
}

SAFECRIT_AVX2 inline int keep_avx2(unsigned high, int i, __m256i rank, uint32_t* positions, uint32_t* ranks) {
    const __m256i position = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(i));
    const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompaction.lanes[high]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions), _mm256_permutevar8x32_epi32(position, order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ranks), _mm256_permutevar8x32_epi32(rank, order));
    return __builtin_popcount(high);
}

// The entries from i on, fewer than a vector.
template <Dtype dtype, bool count_ties>
int filter_rest(const void* data, int i, int count, bool largest, uint32_t floor, uint32_t* positions,
                uint32_t* ranks, int64_t* ties) {
    const int found = filter_plain<dtype, count_ties>(static_cast<const char*>(data) + i * item_size(dtype), count - i,
                                                      largest, floor, positions, ranks, ties);
    for (int j = 0; j < found; ++j) positions[j] += static_cast<uint32_t>(i);
    return found;
}

template <bool count_ties>
SAFECRIT_AVX2 int filter32_avx2(const void* data, int count, bool largest, uint32_t floor, uint32_t* positions,
                                uint32_t* ranks, int64_t* ties) {
    constexpr Dtype dtype = Dtype::float32;
    const __m256i least = _mm256_set1_epi32(static_cast<int>(floor));
    const __m256i tied = _mm256_set1_epi32(static_cast<int>(floor - 1));
    int found = 0, equal = 0, i = 0;
    for (; i + 8 <= count; i += 8) {
        prefetch<dtype>(data, i);
        const __m256i rank = rank_avx2(magnitude_avx2<dtype>(data, i), largest);
        const __m256i high = _mm256_cmpeq_epi32(_mm256_max_epu32(rank, least), rank);  // unsigned >=
        found += keep_avx2(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(high))), i, rank,
                           positions + found, ranks + found);
        if constexpr (count_ties) {
            const __m256i same = _mm256_cmpeq_epi32(rank, tied);
            equal += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(same))));
        }
    }
    *ties += equal;
    return found + filter_rest<dtype, count_ties>(data, i, count, largest, floor, positions + found, ranks + found,
                                                  ties);
}

// One bit for each of sixteen lanes that are all ones or zero.
SAFECRIT_AVX2 inline unsigned lanes16_avx2(__m256i lanes) {
    const __m128i low = _mm256_castsi256_si128(lanes), high = _mm256_extracti128_si256(lanes, 1);
    return static_cast<unsigned>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
}

template <Dtype dtype, bool count_ties>
SAFECRIT_AVX2 int filter16_avx2(const void* data, int count, bool largest, uint32_t floor, uint32_t* positions,
                                uint32_t* ranks, int64_t* ties) {
    const uint32_t floor16 = short_rank<dtype>(floor, largest);
    const uint32_t tied16 = count_ties ? short_rank<dtype>(floor - 1, largest) : floor16;
    const __m256i flip = _mm256_set1_epi16(largest ? 0 : -1);
    const __m256i offset = _mm256_set1_epi16(static_cast<int16_t>(largest ? 0 : kShortInfinity<dtype> + 1));
    const __m256i least = _mm256_set1_epi16(static_cast<int16_t>(floor16));
    const __m256i tied = _mm256_set1_epi16(static_cast<int16_t>(tied16));
    unsigned masks[kBlock / 16];
    int starts[kBlock / 16];
    int vectors = 0, found = 0, equal = 0, i = 0;
    for (; i + 16 <= count; i += 16) {
        prefetch<dtype>(data, i);
        const __m256i entries = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + i));
        const __m256i bits = _mm256_and_si256(entries, _mm256_set1_epi16(0x7fff));
        const __m256i rank = _mm256_add_epi16(_mm256_xor_si256(bits, flip), offset);
        const unsigned high = lanes16_avx2(_mm256_cmpeq_epi16(_mm256_max_epu16(rank, least), rank));
        masks[vectors] = high;
        starts[vectors] = i;
        vectors += high != 0 ? 1 : 0;
        if constexpr (count_ties) equal += __builtin_popcount(lanes16_avx2(_mm256_cmpeq_epi16(rank, tied)));
    }
    for (int v = 0; v < vectors; ++v) {
        for (int half = 0; half < 16; half += 8) {
            const __m256i rank = rank_avx2(magnitude_avx2<dtype>(data, starts[v] + half), largest);
            found += keep_avx2(masks[v] >> half & 0xffu, starts[v] + half, rank, positions + found, ranks + found);
        }
    }
    *ties += tied16 < floor16 ? equal : 0;
    return found + filter_rest<dtype, count_ties>(data, i, count, largest, floor, positions + found, ranks + found,
                                                  ties);
}

#endif

template <Dtype dtype, bool count_ties>
Filter pick_variant() {
#if SAFECRIT_X86_VARIANTS
    const std::string_view variant = cpu_variant();
    if constexpr (dtype == Dtype::float32) {
        if (variant == "avx512") return filter32_avx512<count_ties>;
        if (variant == "avx2") return filter32_avx2<count_ties>;
    } else {
        if (variant == "avx512") return filter16_avx512<dtype, count_ties>;
        if (variant == "avx2") return filter16_avx2<dtype, count_ties>;
    }
#endif
    return filter_plain<dtype, count_ties>;
}

template <bool count_ties>
Filter pick_dtype(Dtype dtype) {
    switch (dtype) {
        case Dtype::bfloat16: return pick_variant<Dtype::bfloat16, count_ties>();
        case Dtype::float16: return pick_variant<Dtype::float16, count_ties>();
        case Dtype::float32: break;
    }
    return pick_variant<Dtype::float32, count_ties>();
}

}  // namespace

Filter select_filter(Dtype dtype, bool count_ties) {
    return count_ties ? pick_dtype<true>(dtype) : pick_dtype<false>(dtype);
}

}  // namespace safecrit
