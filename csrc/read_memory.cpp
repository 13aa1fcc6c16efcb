// Nothing but loads and exclusive ors, and four streams a thread: one stream alone keeps fewer lines on their way.
#include "read_memory.h"

#include <cstring>
#include <vector>

#include "check.h"
#include "simd.h"
#include "threads.h"

namespace safecrit {
namespace {

using Vector = uint64_t __attribute__((vector_size(32)));
constexpr int kStreams = 4, kVectors = 4;
constexpr int64_t kRound = kVectors * int64_t{sizeof(Vector)};

// `rounds` rounds from each of four places `apart` bytes apart.
SAFECRIT_INLINE uint64_t read(const char* data, int64_t apart, int64_t rounds) {
    Vector found[kVectors] = {};
    for (int64_t i = 0; i < rounds; ++i) {
        for (int stream = 0; stream < kStreams; ++stream) {
            for (int j = 0; j < kVectors; ++j) {
                const char* from = data + stream * apart + i * kRound + j * int64_t{sizeof(Vector)};
                found[j] ^= *reinterpret_cast<const Vector*>(from);
            }
        }
    }
    uint64_t result = 0;
    for (const Vector& vector : found) {
        for (int lane = 0; lane < 4; ++lane) result ^= vector[lane];
    }
    return result;
}

uint64_t read_plain(const char* data, int64_t apart, int64_t rounds) { return read(data, apart, rounds); }

#if SAFECRIT_X86_VARIANTS
SAFECRIT_AVX2 uint64_t read_avx2(const char* data, int64_t apart, int64_t rounds) { return read(data, apart, rounds); }
SAFECRIT_AVX512 uint64_t read_avx512(const char* data, int64_t apart, int64_t rounds) { return read(data, apart, rounds); }
#endif

}  // namespace

uint64_t read_memory(const void* data, int64_t bytes, int threads) {
    require(bytes >= 0 && bytes % (kStreams * kRound) == 0, "bytes must be a multiple of 512");
    check_memory({"data", data, bytes / 64, 64, false});
    check_threads(threads);
#if SAFECRIT_X86_VARIANTS
    const auto kernel = pick_variant(&read_plain, &read_avx2, &read_avx512);
#else
    const auto kernel = &read_plain;
#endif
    std::vector<uint64_t> found(static_cast<size_t>(threads), 0);
    const int64_t apart = bytes / kStreams;
    parallel_for(apart / kRound, kRound, threads, [&](int64_t begin, int64_t end, int part) {
        found[static_cast<size_t>(part)] = kernel(static_cast<const char*>(data) + begin * kRound, apart, end - begin);
    });
    uint64_t result = 0;
    for (const uint64_t one : found) result ^= one;
    return result;
}

}  // namespace safecrit
