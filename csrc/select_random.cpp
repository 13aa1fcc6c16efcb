// select_random on the CPU: the k entries with the smallest hashes, hashes made as they are looked at.
//
// Hashes are uniform, so the range in which the k-th lies follows from k alone.
#include <cmath>
#include <string>

#include "pages.h"
#include "select_scan.h"
#include "select_top.h"
#include "simd.h"

namespace safecrit {
namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio, odd: SplitMix64's step

SAFECRIT_INLINE uint64_t mix(uint64_t value) {
    value += kGolden;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

// Ranks, greatest first: the complements of the hashes of entries first to first + count.
SAFECRIT_INLINE void fill(uint64_t key, uint64_t first, int count, uint64_t* ranks) {
    for (int i = 0; i < count; ++i) ranks[i] = ~mix((first + static_cast<uint64_t>(i)) * kGolden + key);
}

using Fill = void (*)(uint64_t, uint64_t, int, uint64_t*);

void fill_plain(uint64_t key, uint64_t first, int count, uint64_t* ranks) { fill(key, first, count, ranks); }

#if SAFECRIT_X86_VARIANTS
SAFECRIT_AVX2 void fill_avx2(uint64_t key, uint64_t first, int count, uint64_t* ranks) {
    fill(key, first, count, ranks);
}

SAFECRIT_AVX512 void fill_avx512(uint64_t key, uint64_t first, int count, uint64_t* ranks) {
    fill(key, first, count, ranks);
}
#else
constexpr auto fill_avx2 = fill_plain, fill_avx512 = fill_plain;
#endif

struct Hashes {
    std::vector<uint64_t> keys;  // of the tensors
    Fill fill = pick_variant<Fill>(fill_plain, fill_avx2, fill_avx512);
    static constexpr uint64_t greatest = ~uint64_t{0};

    int filter(const Segment& segment, int64_t begin, int count, const Range<uint64_t>& range, uint32_t* positions,
               uint64_t* ranks, int64_t*) const {
        fill(keys[segment.tensor], static_cast<uint64_t>(segment.start + begin), count, ranks);
        int found = 0;
        for (int i = 0; i < count; ++i) {
            const uint64_t rank = ranks[i];
            positions[found] = static_cast<uint32_t>(i);
            ranks[found] = rank;
            found += rank >= range.low ? 1 : 0;
        }
        return found;
    }
};

// The rank that about `above` of `total` entries exceed.
uint64_t rank_below(double above, int64_t total) {
    const double share = above / static_cast<double>(total);
    if (share <= 0) return ~uint64_t{0};
    return share >= 1 ? 0 : ~static_cast<uint64_t>(share * 0x1p64);
}

int64_t check(size_t tensors, const std::vector<int64_t>& sizes, int64_t k, const int64_t* out, const int64_t* counts,
              int threads) {
    const auto refuse = [](const std::string& problem) { throw std::invalid_argument("select_random: " + problem); };
    if (tensors != sizes.size()) refuse("as many positions as sizes are needed");
    int64_t total = 0;
    for (const int64_t size : sizes) {
        if (size < 0) refuse("a size is negative");
        if (size > (int64_t{1} << 60) - total) refuse("more than 2^60 entries");
        total += size;
    }
    if (k < 0 || k > total) {
        refuse("k is " + std::to_string(k) + ", but there are " + std::to_string(total) + " entries");
    }
    if (k > 0 && out == nullptr) refuse("null output");
    if (tensors > 0 && counts == nullptr) refuse("null counts");
    if (reinterpret_cast<uintptr_t>(out) % 8 != 0 || reinterpret_cast<uintptr_t>(counts) % 8 != 0) {
        refuse("misaligned output");
    }
    if (threads < 1) refuse("threads must be at least 1");
    return total;
}

}  // namespace

void select_random_cpu(const std::vector<uint64_t>& positions, const std::vector<int64_t>& sizes, int64_t k,
                       uint64_t seed, int64_t* out, int64_t* counts, int threads) {
    const int64_t total = check(positions.size(), sizes, k, out, counts, threads);
    std::fill_n(counts, sizes.size(), 0);
    if (k == 0) return;
    prefer_huge_pages(out, static_cast<size_t>(k) * sizeof(int64_t));
    Hashes hashes;
    for (const uint64_t position : positions) hashes.keys.push_back(mix(mix(seed) + position * kGolden));
    Scan<uint64_t, Hashes> scan(hashes, cut(sizes, int64_t{1} << 19), threads);
    const auto wanted = static_cast<double>(k);
    for (double margin = 6 * std::sqrt(wanted) + 16;; margin *= 2) {  // six standard deviations, and more if need be
        const Range<uint64_t> range{rank_below(wanted + margin, total), rank_below(wanted - margin, total), false};
        if (scan.pass(range, k - 1, total) && k <= scan.above + scan.inside) break;
    }
    scan.finish(k, out, counts);
}

}  // namespace safecrit
