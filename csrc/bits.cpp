// The CPU kernels of bits_from_indices and indices_from_bits.
#include "bits.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "check.h"
#include "simd.h"
#include "threads.h"

namespace safecrit {
namespace {

// Up to eight bytes from `bits` on as one word, the first lowest on every machine.
SAFECRIT_INLINE uint64_t word(const uint8_t* bits, int64_t bytes) {
    uint64_t result = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (bytes >= 8) {
        std::memcpy(&result, bits, 8);
        return result;
    }
#endif
    for (int64_t i = 0; i < std::min<int64_t>(bytes, 8); ++i) result |= static_cast<uint64_t>(bits[i]) << (8 * i);
    return result;
}

SAFECRIT_INLINE int population(uint64_t value) {
    value = value - (value >> 1 & 0x5555555555555555u);
    value = (value & 0x3333333333333333u) + (value >> 2 & 0x3333333333333333u);
    value = (value + (value >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return static_cast<int>(value * 0x0101010101010101u >> 56);
}

SAFECRIT_INLINE int lowest(uint64_t value) {
#if defined(__GNUC__)
    return __builtin_ctzll(value);
#else
    return population((value & (~value + 1)) - 1);
#endif
}

int64_t count(const uint8_t* bits, int64_t bytes) {
    int64_t found = 0;
    for (int64_t i = 0; i < bytes; i += 8) found += population(word(bits + i, bytes - i));
    return found;
}

// Bytes a thread starts at are multiples of eight.
template <typename Body>
int over_bytes(int64_t bytes, int threads, const Body& body) {
    return parallel_for((bytes + 7) / 8, 64, threads, [&](int64_t begin, int64_t end, int part) {
        body(begin * 8, std::min(end * 8, bytes) - begin * 8, part);
    });
}

}  // namespace

void bits_from_indices_cpu(const int64_t* indices, int64_t k, int64_t numel, uint8_t* bits, int threads) {
    check_threads(threads);
    require(numel >= 0, "numel is negative");
    check_memories({{"indices", indices, k, 8, false}, {"bits", bits, numel / 8 + (numel % 8 != 0), 1, true}});
    std::atomic<bool> ascending{true};
    parallel_for(k, 1, threads, [&](int64_t begin, int64_t end, int) {
        uint64_t wrong = 0;
        for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i) wrong |= indices[i] <= indices[i - 1] ? 1u : 0u;
        if (wrong != 0) ascending = false;
    });
    require(ascending, "indices are not strictly ascending");
    require(k == 0 || (indices[0] >= 0 && indices[k - 1] < numel), "indices leave 0 to " + std::to_string(numel - 1));
    over_bytes(numel / 8 + (numel % 8 != 0), threads, [&](int64_t begin, int64_t length, int) {
        std::fill_n(bits + begin, length, uint8_t{0});
        const int64_t* next = std::lower_bound(indices, indices + k, begin * 8);
        const int64_t* stop = std::lower_bound(next, indices + k, (begin + length) * 8);
        for (; next < stop; ++next) bits[*next / 8] = static_cast<uint8_t>(bits[*next / 8] | 1u << *next % 8);
    });
}

int64_t count_bits_cpu(const uint8_t* bits, int64_t bytes, int threads) {
    check_threads(threads);
    check_memory({"bits", bits, bytes, 1, false});
    std::vector<int64_t> found(static_cast<size_t>(threads), 0);
    over_bytes(bytes, threads, [&](int64_t begin, int64_t length, int part) {
        found[static_cast<size_t>(part)] = count(bits + begin, length);
    });
    int64_t total = 0;
    for (const int64_t one : found) total += one;
    return total;
}

void indices_from_bits_cpu(const uint8_t* bits, int64_t bytes, int64_t* indices, int64_t k, int threads) {
    check_threads(threads);
    check_memories({{"bits", bits, bytes, 1, false}, {"indices", indices, k, 8, true}});
    require(bytes <= INT64_MAX / 8, "bits: bad size");
    std::vector<int64_t> found(static_cast<size_t>(threads) + 1, 0);
    over_bytes(bytes, threads, [&](int64_t begin, int64_t length, int part) {
        found[static_cast<size_t>(part) + 1] = count(bits + begin, length);
    });
    for (size_t part = 1; part < found.size(); ++part) found[part] += found[part - 1];
    require(found.back() == k, std::to_string(found.back()) + " bits are set, room for " + std::to_string(k));
    over_bytes(bytes, threads, [&](int64_t begin, int64_t length, int part) {
        int64_t* next = indices + found[static_cast<size_t>(part)];
        for (int64_t i = 0; i < length; i += 8) {
            for (uint64_t rest = word(bits + begin + i, length - i); rest != 0; rest &= rest - 1) {
                *next++ = (begin + i) * 8 + lowest(rest);
            }
        }
    });
}

}  // namespace safecrit
