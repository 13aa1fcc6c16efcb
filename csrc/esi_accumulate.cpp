// The CPU kernel of esi_accumulate_: one pass, 10 bytes moved per bfloat16 entry.
//
// The inner loop is written once and compiled for AVX-512, AVX2 and the base instruction set; the
// processor picks at run time, so one build serves every x86-64 machine. Product and sum are rounded
// separately (no fused multiply-add, -ffp-contract=off), so all variants, the CUDA and Triton kernels
// and the torch reference give the same bits.
#include "esi_accumulate.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#include "threads.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SAFECRIT_X86_VARIANTS 1
#else
#define SAFECRIT_X86_VARIANTS 0
#endif

#if defined(__GNUC__)
#define SAFECRIT_INLINE inline __attribute__((always_inline))
#else
#define SAFECRIT_INLINE inline
#endif

namespace safecrit {
namespace {

constexpr int64_t kBlock = int64_t{1} << 20;  // entries whose skips are counted in 32 bits, so that counting vectorises

SAFECRIT_INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Float32 {
    using Storage = uint32_t;
    static SAFECRIT_INLINE bool finite(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }
    static SAFECRIT_INLINE float value(uint32_t bits) { return from_bits(bits); }
};

struct Bfloat16 {
    using Storage = uint16_t;
    static SAFECRIT_INLINE bool finite(uint32_t bits) { return (bits & 0x7f80u) != 0x7f80u; }
    static SAFECRIT_INLINE float value(uint32_t bits) { return from_bits(bits << 16); }
};

struct Float16 {
    using Storage = uint16_t;
    static SAFECRIT_INLINE bool finite(uint32_t bits) { return (bits & 0x7c00u) != 0x7c00u; }
    // Exponent and fraction moved into float32's fields, then the bias corrected (127 - 15 = 112) by an exact
    // multiplication, which normalises subnormals too. Infinities and NaN never get here.
    static SAFECRIT_INLINE float value(uint32_t bits) {
        const float magnitude = from_bits((bits & 0x7fffu) << 13) * from_bits((127u + 112u) << 23);
        uint32_t result;
        std::memcpy(&result, &magnitude, sizeof result);
        return from_bits(result | (bits & 0x8000u) << 16);
    }
};

template <Reduction reduction>
SAFECRIT_INLINE float contribution(float gradient, float sigma) {
    if (reduction == Reduction::square) return gradient * gradient;
    const float product = sigma * gradient;
    return reduction == Reduction::absolute ? from_bits([product] {
        uint32_t bits;
        std::memcpy(&bits, &product, sizeof bits);
        return bits & 0x7fffffffu;
    }()) : product;
}

template <typename Format, Reduction reduction>
SAFECRIT_INLINE uint32_t block(float* acc, int64_t acc_stride, const typename Format::Storage* grad,
                               int64_t grad_stride, int64_t count, float sigma) {
    uint32_t skipped = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = grad[i * grad_stride];
        const bool finite = Format::finite(bits);
        const float old = acc[i * acc_stride];
        const float sum = old + contribution<reduction>(Format::value(bits), sigma);
        acc[i * acc_stride] = finite ? sum : old;
        skipped += finite ? 0u : 1u;
    }
    return skipped;
}

// One row: unit strides are passed as constants, which is what lets the compiler vectorise.
template <typename Format, Reduction reduction>
SAFECRIT_INLINE int64_t row(float* acc, int64_t acc_stride, const void* grad_pointer, int64_t grad_stride,
                            int64_t count, float sigma) {
    const auto* grad = static_cast<const typename Format::Storage*>(grad_pointer);
    int64_t skipped = 0;
    for (int64_t start = 0; start < count; start += kBlock) {
        const int64_t size = std::min(kBlock, count - start);
        float* a = acc + start * acc_stride;
        const auto* g = grad + start * grad_stride;
        skipped += acc_stride == 1 && grad_stride == 1
                       ? block<Format, reduction>(a, 1, g, 1, size, sigma)
                       : block<Format, reduction>(a, acc_stride, g, grad_stride, size, sigma);
    }
    return skipped;
}

using Row = int64_t (*)(float*, int64_t, const void*, int64_t, int64_t, float);

template <typename Format, Reduction reduction>
int64_t row_plain(float* acc, int64_t acc_stride, const void* grad, int64_t grad_stride, int64_t count, float sigma) {
    return row<Format, reduction>(acc, acc_stride, grad, grad_stride, count, sigma);
}

#if SAFECRIT_X86_VARIANTS
template <typename Format, Reduction reduction>
__attribute__((target("avx2"))) int64_t row_avx2(float* acc, int64_t acc_stride, const void* grad,
                                                 int64_t grad_stride, int64_t count, float sigma) {
    return row<Format, reduction>(acc, acc_stride, grad, grad_stride, count, sigma);
}

template <typename Format, Reduction reduction>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) int64_t row_avx512(float* acc, int64_t acc_stride,
                                                                                const void* grad, int64_t grad_stride,
                                                                                int64_t count, float sigma) {
    return row<Format, reduction>(acc, acc_stride, grad, grad_stride, count, sigma);
}
#endif

enum class Variant { plain, avx2, avx512 };

Variant find_variant() {
#if SAFECRIT_X86_VARIANTS
    // SAFECRIT_CPU=plain or avx2 holds the kernels back, to test what other machines run.
    const char* limit = std::getenv("SAFECRIT_CPU");
    const std::string_view wanted = limit == nullptr ? "" : limit;
    if (wanted == "plain") return Variant::plain;
    if (wanted != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        return Variant::avx512;
    }
    if (__builtin_cpu_supports("avx2")) return Variant::avx2;
#endif
    return Variant::plain;
}

Variant detect() {
    static const Variant found = find_variant();
    return found;
}

template <typename Format, Reduction reduction>
Row pick_variant() {
#if SAFECRIT_X86_VARIANTS
    switch (detect()) {
        case Variant::avx512: return row_avx512<Format, reduction>;
        case Variant::avx2: return row_avx2<Format, reduction>;
        case Variant::plain: break;
    }
#endif
    return row_plain<Format, reduction>;
}

template <typename Format>
Row pick_reduction(Reduction reduction) {
    switch (reduction) {
        case Reduction::absolute: return pick_variant<Format, Reduction::absolute>();
        case Reduction::square: return pick_variant<Format, Reduction::square>();
        case Reduction::signed_sum: break;
    }
    return pick_variant<Format, Reduction::signed_sum>();
}

Row pick(Dtype dtype, Reduction reduction) {
    switch (dtype) {
        case Dtype::bfloat16: return pick_reduction<Bfloat16>(reduction);
        case Dtype::float16: return pick_reduction<Float16>(reduction);
        case Dtype::float32: break;
    }
    return pick_reduction<Float32>(reduction);
}

}  // namespace

const char* cpu_variant() {
    switch (detect()) {
        case Variant::avx512: return "avx512";
        case Variant::avx2: return "avx2";
        case Variant::plain: break;
    }
    return "plain";
}

int64_t esi_accumulate_cpu(const AccumulateArgs& args, int threads) {
    if (args.rows == 0 || args.cols == 0) return 0;
    const Row kernel = pick(args.dtype, args.reduction);
    const int64_t item = args.dtype == Dtype::float32 ? 4 : 2;
    const auto* grad = static_cast<const char*>(args.grad);
    std::vector<int64_t> skipped(static_cast<size_t>(std::max(threads, 1)), 0);
    // Few rows are split along their columns, many along the rows.
    const bool by_rows = args.rows >= threads * int64_t{8};
    parallel_for(by_rows ? args.rows : args.cols, by_rows ? args.cols : args.rows, threads,
                 [&](int64_t begin, int64_t end, int part) {
        const int64_t row_begin = by_rows ? begin : 0, row_end = by_rows ? end : args.rows;
        const int64_t col_begin = by_rows ? 0 : begin, count = by_rows ? args.cols : end - begin;
        int64_t bad = 0;
        for (int64_t r = row_begin; r < row_end; ++r) {
            bad += kernel(args.acc + r * args.acc_row_stride + col_begin * args.acc_col_stride, args.acc_col_stride,
                          grad + item * (r * args.grad_row_stride + col_begin * args.grad_col_stride),
                          args.grad_col_stride, count, args.sigma);
        }
        skipped[static_cast<size_t>(part)] = bad;
    });
    int64_t total = 0;
    for (const int64_t bad : skipped) total += bad;
    return total;
}

}  // namespace safecrit
