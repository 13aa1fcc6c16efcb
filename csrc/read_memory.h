// The benchmarks' yardstick of reading.
#pragma once

#include <cstdint>

namespace safecrit {

// Exclusive or of all 64-bit words: a read at the memory's speed, with at most `threads` threads. `data` is aligned
// to 64 bytes, `bytes` a multiple of 512. Throws std::invalid_argument for anything else.
uint64_t read_memory(const void* data, int64_t bytes, int threads);

}  // namespace safecrit
