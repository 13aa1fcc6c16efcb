// What the vectorised CPU kernels share: the instruction set found at run time, and the three float formats.
//
// A kernel's inner function is SAFECRIT_INLINE and is inlined into one function for each Variant, whose target
// attribute lets the compiler use that instruction set; so one build serves every x86-64 machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "dtype.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SAFECRIT_X86_VARIANTS 1
#define SAFECRIT_AVX2 __attribute__((target("avx2")))
#define SAFECRIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c")))
#else
#define SAFECRIT_X86_VARIANTS 0
#endif

#if defined(__GNUC__)
#define SAFECRIT_INLINE inline __attribute__((always_inline))
#else
#define SAFECRIT_INLINE inline
#endif

namespace safecrit {

enum class Variant { plain, avx2, avx512 };

inline Variant find_variant() {
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

inline Variant variant() {
    static const Variant found = find_variant();
    return found;
}

// The entry of a table {plain, avx2, avx512} that this machine runs.
template <typename Function>
Function pick_variant(Function plain, [[maybe_unused]] Function avx2, [[maybe_unused]] Function avx512) {
    switch (variant()) {
        case Variant::avx512: return avx512;
        case Variant::avx2: return avx2;
        case Variant::plain: break;
    }
    return plain;
}

SAFECRIT_INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

SAFECRIT_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// `value` widens a finite entry, `load` any; `store` rounds to nearest, ties to even. Written without branches, so
// that loops over them vectorise.
struct Float32 {
    using Storage = uint32_t;
    static SAFECRIT_INLINE bool finite(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }
    static SAFECRIT_INLINE float value(uint32_t bits) { return from_bits(bits); }
    static SAFECRIT_INLINE float load(uint32_t bits) { return from_bits(bits); }
    static SAFECRIT_INLINE Storage store(float value) { return to_bits(value); }
};

struct Bfloat16 {
    using Storage = uint16_t;
    static SAFECRIT_INLINE bool finite(uint32_t bits) { return (bits & 0x7f80u) != 0x7f80u; }
    static SAFECRIT_INLINE float value(uint32_t bits) { return from_bits(bits << 16); }
    static SAFECRIT_INLINE float load(uint32_t bits) { return value(bits); }
    static SAFECRIT_INLINE Storage store(float value) {
        const uint32_t bits = to_bits(value);
        const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        return static_cast<Storage>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
};

struct Float16 {
    using Storage = uint16_t;
    static SAFECRIT_INLINE bool finite(uint32_t bits) { return (bits & 0x7c00u) != 0x7c00u; }
    // Exponent and fraction moved into float32's fields, then the bias corrected (127 - 15 = 112) by an exact
    // multiplication, which normalises subnormals too.
    static SAFECRIT_INLINE float value(uint32_t bits) {
        const float magnitude = from_bits((bits & 0x7fffu) << 13) * from_bits((127u + 112u) << 23);
        return from_bits(to_bits(magnitude) | (bits & 0x8000u) << 16);
    }
    static SAFECRIT_INLINE float load(uint32_t bits) {
        const uint32_t special = 0x7f800000u | (bits & 0x3ffu) << 13 | (bits & 0x8000u) << 16;
        return from_bits(finite(bits) ? to_bits(value(bits)) : special);
    }
    static SAFECRIT_INLINE Storage store(float value) {
        const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffffu;
        // From 2^16 on: infinity, or NaN. Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the end.
        const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
        const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
        const uint32_t small = magnitude < 0x38800000u ? subnormal : normal;
        return static_cast<Storage>((magnitude >= 0x47800000u ? special : small) | (bits >> 16 & 0x8000u));
    }
};

}  // namespace safecrit
