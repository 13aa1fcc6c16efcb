// The inner loop of select_top: of a block of scores, the entries that are high enough, with their ranks.
//
// The float32 bits of |x|, read as an integer, sort like |x| itself. A rank is these bits where the largest are
// selected, and kInfinity minus these bits where the smallest are: the greater the sooner selected. A rank above
// kInfinity belongs to a NaN, whichever way.
#pragma once

#include <cstdint>

#include "esi_accumulate.h"

namespace safecrit {

constexpr uint32_t kInfinity = 0x7f800000u;  // the bits of float32 infinity
constexpr int kBlock = 4096;                 // entries filtered at a time: both outputs stay in the first-level cache
constexpr int kRoom = kBlock + 16;           // of an output: whole vectors are stored

// Writes position and rank of the entries of data[0, count) whose rank is at least `floor`, NaN among them, in
// order; returns their number. `ties` is raised by the number of entries of rank floor - 1, where the filter counts
// them. count <= kBlock.
using Filter = int (*)(const void* data, int count, bool largest, uint32_t floor, uint32_t* positions,
                       uint32_t* ranks, int64_t* ties);

Filter select_filter(Dtype dtype, bool count_ties);

}  // namespace safecrit
