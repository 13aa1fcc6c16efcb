// Eight independent vectors a round, nothing but loads and exclusive ors: no arithmetic can hold the memory up.
#include "read_memory.h"

#include <cstring>
#include <vector>

#include "check.h"
#include "simd.h"
#include "threads.h"

namespace safecrit {
namespace {

using Vector = uint64_t __attribute__((vector_size(64)));
constexpr int kVectors = 8;
constexpr int64_t kRound = kVectors * int64_t{sizeof(Vector)};

SAFECRIT_INLINE uint64_t read(const char* data, int64_t rounds) {
    Vector found[kVectors] = {};
    for (int64_t i = 0; i < rounds; ++i) {
        for (int j = 0; j < kVectors; ++j) {
            found[j] ^= *reinterpret_cast<const Vector*>(data + i * kRound + j * int64_t{sizeof(Vector)});
        }
    }
    uint64_t result = 0;
    for (const Vector& vector : found) {
        for (int lane = 0; lane < 8; ++lane) result ^= vector[lane];
    }
    return result;
}

uint64_t read_plain(const char* data, int64_t rounds) { return read(data, rounds); }

#if SAFECRIT_X86_VARIANTS
SAFECRIT_AVX2 uint64_t read_avx2(const char* data, int64_t rounds) { return read(data, rounds); }
SAFECRIT_AVX512 uint64_t read_avx512(const char* data, int64_t rounds) { return read(data, rounds); }
#endif

}  // namespace

uint64_t read_memory(const void* data, int64_t bytes, int threads) {
    require(bytes >= 0 && bytes % kRound == 0, "bytes must be a multiple of 512");
    check_memory({"data", data, bytes / 64, 64, false});
    check_threads(threads);
#if SAFECRIT_X86_VARIANTS
    const auto kernel = pick_variant(&read_plain, &read_avx2, &read_avx512);
#else
    const auto kernel = &read_plain;
#endif
    std::vector<uint64_t> found(static_cast<size_t>(threads), 0);
    parallel_for(bytes / kRound, kRound / 4, threads, [&](int64_t begin, int64_t end, int part) {
        found[static_cast<size_t>(part)] = kernel(static_cast<const char*>(data) + begin * kRound, end - begin);
    });
    uint64_t result = 0;
    for (const uint64_t one : found) result ^= one;
    return result;
}

}  // namespace safecrit
