// The CPU kernel of esi_accumulate_: one pass, 10 bytes moved per bfloat16 entry.
//
// The inner loop is written once and compiled for AVX-512, AVX2 and the base instruction set; the
// processor picks at run time, so one build serves every x86-64 machine. Product and sum are rounded
// separately (no fused multiply-add, -ffp-contract=off), so all variants, the CUDA and Triton kernels
// and the torch reference give the same bits.
#include "esi_accumulate.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "simd.h"
#include "threads.h"

namespace safecrit {
namespace {

constexpr int64_t kBlock = int64_t{1} << 20;  // entries whose skips are counted in 32 bits, so that counting vectorises

template <Reduction reduction>
SAFECRIT_INLINE float contribution(float gradient, float sigma) {
    if (reduction == Reduction::square) return gradient * gradient;
    const float product = sigma * gradient;
    return reduction == Reduction::absolute ? from_bits(to_bits(product) & 0x7fffffffu) : product;
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
SAFECRIT_AVX2 int64_t row_avx2(float* acc, int64_t acc_stride, const void* grad, int64_t grad_stride, int64_t count,
                               float sigma) {
    return row<Format, reduction>(acc, acc_stride, grad, grad_stride, count, sigma);
}

template <typename Format, Reduction reduction>
SAFECRIT_AVX512 int64_t row_avx512(float* acc, int64_t acc_stride, const void* grad, int64_t grad_stride,
                                   int64_t count, float sigma) {
    return row<Format, reduction>(acc, acc_stride, grad, grad_stride, count, sigma);
}
#endif

template <typename Format, Reduction reduction>
Row pick_row() {
#if SAFECRIT_X86_VARIANTS
    return pick_variant<Row>(row_plain<Format, reduction>, row_avx2<Format, reduction>, row_avx512<Format, reduction>);
#else
    return row_plain<Format, reduction>;
#endif
}

template <typename Format>
Row pick_reduction(Reduction reduction) {
    switch (reduction) {
        case Reduction::absolute: return pick_row<Format, Reduction::absolute>();
        case Reduction::square: return pick_row<Format, Reduction::square>();
        case Reduction::signed_sum: break;
    }
    return pick_row<Format, Reduction::signed_sum>();
}

Row pick(Dtype dtype, Reduction reduction) {
    switch (dtype) {
        case Dtype::bfloat16: return pick_reduction<Bfloat16>(reduction);
        case Dtype::float16: return pick_reduction<Float16>(reduction);
        case Dtype::float32: break;
    }
    return pick_reduction<Float32>(reduction);
}

void check(const AccumulateArgs& args) {
    check_dtype(static_cast<int>(args.dtype));
    const int reduction = static_cast<int>(args.reduction);
    require(reduction >= 0 && reduction <= 2, "unknown reduction code " + std::to_string(reduction));
    const auto reach = [&](int64_t row_stride, int64_t col_stride) {
        if (checked_product(args.rows, args.cols) == 0) return int64_t{0};
        return checked_product(args.rows - 1, row_stride) + checked_product(args.cols - 1, col_stride) + 1;
    };
    check_memories({{"acc", args.acc, reach(args.acc_row_stride, args.acc_col_stride), 4, true},
                    {"grad", args.grad, reach(args.grad_row_stride, args.grad_col_stride), item_size(args.dtype), false}});
    // Elements of acc must not share memory, or threads would race: one dimension steps over the other.
    const int64_t row = args.rows > 1 ? args.acc_row_stride : 0, col = args.cols > 1 ? args.acc_col_stride : 0;
    const bool nested = (args.cols < 2 || col > 0) && (args.rows < 2 || row > 0) &&
                        (args.rows < 2 || args.cols < 2 || row > checked_product(args.cols - 1, col) ||
                         col > checked_product(args.rows - 1, row));
    require(nested || args.rows == 0 || args.cols == 0, "elements of acc share memory");
}

}  // namespace

const char* cpu_variant() {
    switch (variant()) {
        case Variant::avx512: return "avx512";
        case Variant::avx2: return "avx2";
        case Variant::plain: break;
    }
    return "plain";
}

int64_t esi_accumulate_cpu(const AccumulateArgs& args, int threads) {
    check(args);
    check_threads(threads);
    if (args.rows == 0 || args.cols == 0) return 0;
    const Row kernel = pick(args.dtype, args.reduction);
    const int64_t item = item_size(args.dtype);
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
