// The CPU kernel of gather_: indices are sorted as a rule, but too far apart for the processor's own prefetching.
#include "gather.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "indices.h"
#include "threads.h"

namespace safecrit {
namespace {

constexpr int64_t kAhead = 64;  // entries between the fetch of a value and its use

template <typename Format, typename Index>
SAFECRIT_INLINE void gather_as(const GatherArgs& args, int64_t begin, int64_t end) {
    const auto* values = static_cast<const typename Format::Storage*>(args.values);
    const auto* indices = static_cast<const Index*>(args.indices);
    float* out = args.out;
    for (int64_t start = begin; start < end; start += kAhead) {
        const int64_t stop = std::min(end, start + kAhead), ahead = std::min(end, stop + kAhead);
        for (int64_t i = stop; i < ahead; ++i) SAFECRIT_PREFETCH_READ(values + indices[i]);
        if (args.add) {
            for (int64_t i = start; i < stop; ++i) out[i] += Format::load(values[indices[i]]);
        } else {
            for (int64_t i = start; i < stop; ++i) out[i] = Format::load(values[indices[i]]);
        }
    }
}

template <typename Index>
SAFECRIT_INLINE void gather_range(const GatherArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
        case Dtype::bfloat16: return gather_as<Bfloat16, Index>(args, begin, end);
        case Dtype::float16: return gather_as<Float16, Index>(args, begin, end);
        case Dtype::float32: return gather_as<Float32, Index>(args, begin, end);
    }
}

using Range = void (*)(const GatherArgs&, int64_t, int64_t);
using Inside = bool (*)(const GatherArgs&, int64_t, int64_t);

SAFECRIT_INLINE void range(const GatherArgs& args, int64_t begin, int64_t end) {
    args.wide ? gather_range<int64_t>(args, begin, end) : gather_range<int32_t>(args, begin, end);
}

SAFECRIT_INLINE bool good(const GatherArgs& args, int64_t begin, int64_t end) {
    return args.wide ? inside(static_cast<const int64_t*>(args.indices) + begin, end - begin, args.numel)
                     : inside(static_cast<const int32_t*>(args.indices) + begin, end - begin, args.numel);
}

void range_plain(const GatherArgs& args, int64_t begin, int64_t end) { range(args, begin, end); }
bool good_plain(const GatherArgs& args, int64_t begin, int64_t end) { return good(args, begin, end); }
#if SAFECRIT_X86_VARIANTS
SAFECRIT_AVX2 void range_avx2(const GatherArgs& args, int64_t begin, int64_t end) { range(args, begin, end); }
SAFECRIT_AVX2 bool good_avx2(const GatherArgs& args, int64_t begin, int64_t end) { return good(args, begin, end); }
SAFECRIT_AVX512 void range_avx512(const GatherArgs& args, int64_t begin, int64_t end) { range(args, begin, end); }
SAFECRIT_AVX512 bool good_avx512(const GatherArgs& args, int64_t begin, int64_t end) { return good(args, begin, end); }
#else
constexpr auto range_avx2 = range_plain, range_avx512 = range_plain;
constexpr auto good_avx2 = good_plain, good_avx512 = good_plain;
#endif

}  // namespace

void gather_cpu(const GatherArgs& args, int threads) {
    check_threads(threads);
    if (args.k == 0) return;
    const auto all_inside = pick_variant<Inside>(good_plain, good_avx2, good_avx512);
    std::atomic<bool> fine{true};
    parallel_for(args.k, 1, threads, [&](int64_t begin, int64_t end, int) {
        if (!all_inside(args, begin, end)) fine = false;
    });
    require(fine, "indices leave 0 to " + std::to_string(args.numel - 1));
    const auto run = pick_variant<Range>(range_plain, range_avx2, range_avx512);
    parallel_for(args.k, 4, threads, [&](int64_t begin, int64_t end, int) { run(args, begin, end); });
}

}  // namespace safecrit
