// The CPU kernels of sparse_adamw_ and masked_adamw_: chunks that stay in the first-level cache, float32 tensors
// updated where they lie, others widened into a buffer and rounded back.
#include "adamw.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "check.h"
#include "indices.h"
#include "simd.h"
#include "threads.h"

namespace safecrit {
namespace {

constexpr int64_t kSparseChunk = 256;   // weight lines fetched ahead: 16 KiB
constexpr int64_t kMaskedChunk = 256;  // entries, a multiple of 8: unpacking their mask bits leaves no gap in the reading

// The new values of one entry.
SAFECRIT_INLINE void update(float& weight, float grad, float& exp_avg, float& exp_avg_sq, const AdamWSettings& with) {
    const float g = grad * with.clip;
    exp_avg = exp_avg + with.one_minus_beta1 * (g - exp_avg);
    exp_avg_sq = with.beta2 * exp_avg_sq + with.one_minus_beta2 * g * g;
    weight = with.keep * weight - with.step_size * exp_avg / (std::sqrt(exp_avg_sq) + with.eps);
}

// `old` where `frozen` is all ones, `updated` where it is 0. From ?: the compiler makes a masked store, which halves
// the speed from memory.
SAFECRIT_INLINE uint32_t pick_bits(uint32_t frozen, uint32_t old, uint32_t updated) {
    return (old & frozen) | (updated & ~frozen);
}

SAFECRIT_INLINE float pick(uint32_t frozen, float old, float updated) {
    return from_bits(pick_bits(frozen, to_bits(old), to_bits(updated)));
}

template <typename Format>
SAFECRIT_INLINE void widen_as(const void* from, int64_t start, int64_t count, float* to) {
    const auto* values = static_cast<const typename Format::Storage*>(from) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = Format::load(values[i]);
}

// `count` entries of `from` as float32: in place, or in `buffer`.
SAFECRIT_INLINE const float* widen(const void* from, Dtype dtype, int64_t start, int64_t count, float* buffer) {
    switch (dtype) {
        case Dtype::bfloat16: widen_as<Bfloat16>(from, start, count, buffer); return buffer;
        case Dtype::float16: widen_as<Float16>(from, start, count, buffer); return buffer;
        case Dtype::float32: break;
    }
    return static_cast<const float*>(from) + start;
}

template <typename Format>
SAFECRIT_INLINE void narrow_as(void* to, int64_t start, int64_t count, const float* from, const uint32_t* frozen) {
    auto* values = static_cast<typename Format::Storage*>(to) + start;
    for (int64_t i = 0; i < count; ++i) {
        using Item = typename Format::Storage;
        values[i] = static_cast<Item>(pick_bits(frozen[i], values[i], Format::store(from[i])));
    }
}

// The way back: a float32 tensor has been updated in place.
SAFECRIT_INLINE void narrow(void* to, Dtype dtype, int64_t start, int64_t count, const float* from,
                            const uint32_t* frozen) {
    if (dtype == Dtype::bfloat16) narrow_as<Bfloat16>(to, start, count, from, frozen);
    if (dtype == Dtype::float16) narrow_as<Float16>(to, start, count, from, frozen);
}

SAFECRIT_INLINE void masked_range(const MaskedAdamWArgs& args, int64_t begin, int64_t end) {
    alignas(64) float buffers[4][kMaskedChunk];
    alignas(64) uint32_t frozen[kMaskedChunk];
    const AdamWSettings with = args.settings;
    for (int64_t start = begin; start < end; start += kMaskedChunk) {
        const int64_t count = std::min(kMaskedChunk, end - start);
        const uint8_t* bytes = args.bits + start / 8;
        for (int64_t byte = 0; byte < (count + 7) / 8; ++byte) {
            for (uint32_t bit = 0; bit < 8; ++bit) frozen[byte * 8 + bit] = 0u - (bytes[byte] >> bit & 1u);
        }
        const float* __restrict grad = widen(args.grad, args.grad_dtype, start, count, buffers[0]);
        auto* __restrict w = const_cast<float*>(widen(args.weight, args.weight_dtype, start, count, buffers[1]));
        auto* __restrict m = const_cast<float*>(widen(args.exp_avg, args.exp_avg_dtype, start, count, buffers[2]));
        auto* __restrict v = const_cast<float*>(widen(args.exp_avg_sq, args.exp_avg_sq_dtype, start, count, buffers[3]));
        for (int64_t i = 0; i < count; ++i) {
            float weight = w[i], exp_avg = m[i], exp_avg_sq = v[i];
            update(weight, grad[i], exp_avg, exp_avg_sq, with);
            w[i] = pick(frozen[i], w[i], weight);
            m[i] = pick(frozen[i], m[i], exp_avg);
            v[i] = pick(frozen[i], v[i], exp_avg_sq);
        }
        narrow(args.weight, args.weight_dtype, start, count, w, frozen);
        narrow(args.exp_avg, args.exp_avg_dtype, start, count, m, frozen);
        narrow(args.exp_avg_sq, args.exp_avg_sq_dtype, start, count, v, frozen);
    }
}

template <typename Format>
SAFECRIT_INLINE void scatter(void* weight, const int64_t* indices, const float* from, int64_t count) {
    auto* values = static_cast<typename Format::Storage*>(weight);
    typename Format::Storage rounded[kSparseChunk];
    for (int64_t i = 0; i < count; ++i) rounded[i] = Format::store(from[i]);
    for (int64_t i = 0; i < count; ++i) values[indices[i]] = rounded[i];
}

SAFECRIT_INLINE void sparse_range(const SparseAdamWArgs& args, int64_t begin, int64_t end) {
    alignas(64) float buffer[kSparseChunk];
    const AdamWSettings with = args.settings;
    const int64_t item = item_size(args.weight_dtype);
    for (int64_t start = begin; start < end; start += kSparseChunk) {
        const int64_t count = std::min(kSparseChunk, end - start);
        const int64_t* indices = args.indices + start;
        for (int64_t i = 0; i < count; ++i) {
            SAFECRIT_PREFETCH_WRITE(static_cast<const char*>(args.weight) + indices[i] * item);
        }
        const float* __restrict grad = widen(args.grad, args.grad_dtype, start, count, buffer);
        float* __restrict w = args.master + start;
        float* __restrict m = args.exp_avg + start;
        float* __restrict v = args.exp_avg_sq + start;
        for (int64_t i = 0; i < count; ++i) update(w[i], grad[i], m[i], v[i], with);
        switch (args.weight_dtype) {
            case Dtype::bfloat16: scatter<Bfloat16>(args.weight, indices, w, count); break;
            case Dtype::float16: scatter<Float16>(args.weight, indices, w, count); break;
            case Dtype::float32: scatter<Float32>(args.weight, indices, w, count); break;
        }
    }
}

template <typename Args>
using Range = void (*)(const Args&, int64_t, int64_t);
using Inside = bool (*)(const int64_t*, int64_t, int64_t);

void masked_plain(const MaskedAdamWArgs& args, int64_t begin, int64_t end) { masked_range(args, begin, end); }
void sparse_plain(const SparseAdamWArgs& args, int64_t begin, int64_t end) { sparse_range(args, begin, end); }
bool inside_plain(const int64_t* indices, int64_t count, int64_t numel) { return inside(indices, count, numel); }

#if SAFECRIT_X86_VARIANTS
SAFECRIT_AVX2 void masked_avx2(const MaskedAdamWArgs& args, int64_t begin, int64_t end) {
    masked_range(args, begin, end);
}
SAFECRIT_AVX512 void masked_avx512(const MaskedAdamWArgs& args, int64_t begin, int64_t end) {
    masked_range(args, begin, end);
}
SAFECRIT_AVX2 void sparse_avx2(const SparseAdamWArgs& args, int64_t begin, int64_t end) {
    sparse_range(args, begin, end);
}
SAFECRIT_AVX512 void sparse_avx512(const SparseAdamWArgs& args, int64_t begin, int64_t end) {
    sparse_range(args, begin, end);
}
SAFECRIT_AVX2 bool inside_avx2(const int64_t* indices, int64_t count, int64_t numel) {
    return inside(indices, count, numel);
}
SAFECRIT_AVX512 bool inside_avx512(const int64_t* indices, int64_t count, int64_t numel) {
    return inside(indices, count, numel);
}
#else
constexpr auto masked_avx2 = masked_plain, masked_avx512 = masked_plain;
constexpr auto sparse_avx2 = sparse_plain, sparse_avx512 = sparse_plain;
constexpr auto inside_avx2 = inside_plain, inside_avx512 = inside_plain;
#endif

}  // namespace

void sparse_adamw_cpu(const SparseAdamWArgs& args, int threads) {
    check_threads(threads);
    if (args.k == 0) return;
    const auto all_inside = pick_variant<Inside>(inside_plain, inside_avx2, inside_avx512);
    std::atomic<bool> good{true};
    parallel_for(args.k, 1, threads, [&](int64_t begin, int64_t end, int) {
        if (!all_inside(args.indices + begin, end - begin, args.numel)) good = false;
    });
    require(good, "indices leave 0 to " + std::to_string(args.numel - 1));
    const auto range = pick_variant<Range<SparseAdamWArgs>>(sparse_plain, sparse_avx2, sparse_avx512);
    parallel_for(args.k, 4, threads, [&](int64_t begin, int64_t end, int) { range(args, begin, end); });
}

void masked_adamw_cpu(const MaskedAdamWArgs& args, int threads) {
    check_threads(threads);
    const auto range = pick_variant<Range<MaskedAdamWArgs>>(masked_plain, masked_avx2, masked_avx512);
    // Threads meet at whole bytes of the mask, and at cache lines of the tensors.
    constexpr int64_t kUnit = 64;
    parallel_for((args.numel + kUnit - 1) / kUnit, kUnit, threads, [&](int64_t begin, int64_t end, int) {
        range(args, begin * kUnit, std::min(end * kUnit, args.numel));
    });
}

}  // namespace safecrit
