// Large outputs in large pages: the first touch of 4 KiB pages costs more than what is written to them.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace safecrit {

// Advice to the system about `bytes` from `address` on, which are about to be written for the first time.
inline void prefer_huge_pages([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = uintptr_t{1} << 21;
    const uintptr_t start = reinterpret_cast<uintptr_t>(address);
    const uintptr_t begin = (start + kPage - 1) / kPage * kPage, end = (start + bytes) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace safecrit
