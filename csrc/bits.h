// Mask encodings: flat indices, and bits of which entry i is bit i % 8 of byte i / 8.
#pragma once

#include <cstdint>

namespace safecrit {

// All on the CPU with at most `threads` threads; they throw std::invalid_argument for arguments they cannot run with.

// Sets the bits of `indices` [k], strictly ascending in [0, numel), in `bits`, ceil(numel / 8) bytes, and clears the
// others. Nothing is written where an index is out of order or range.
void bits_from_indices_cpu(const int64_t* indices, int64_t k, int64_t numel, uint8_t* bits, int threads);

// Number of bits set in `bytes` bytes.
int64_t count_bits_cpu(const uint8_t* bits, int64_t bytes, int threads);

// Writes the indices of the bits set, ascending, to `indices`, which must have room for exactly `k`.
void indices_from_bits_cpu(const uint8_t* bits, int64_t bytes, int64_t* indices, int64_t k, int threads);

}  // namespace safecrit
