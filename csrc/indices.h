// Reading through indices on the CPU: the check of their range, and loads fetched ahead.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__GNUC__)
#define SAFECRIT_PREFETCH_READ(address) __builtin_prefetch(address, 0)
#define SAFECRIT_PREFETCH_WRITE(address) __builtin_prefetch(address, 1)
#else
#define SAFECRIT_PREFETCH_READ(address) (void)(address)
#define SAFECRIT_PREFETCH_WRITE(address) (void)(address)
#endif

namespace safecrit {

// Whether all of `indices` lie in [0, numel); as unsigned numbers, negative ones are large.
template <typename Index>
SAFECRIT_INLINE bool inside(const Index* indices, int64_t count, int64_t numel) {
    uint64_t outside = 0;
    for (int64_t i = 0; i < count; ++i) {
        outside |= static_cast<uint64_t>(indices[i]) >= static_cast<uint64_t>(numel) ? 1u : 0u;
    }
    return outside == 0;
}

}  // namespace safecrit
