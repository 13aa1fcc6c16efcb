// Arguments of the native functions, checked: what no caller may get wrong without a Python exception.
//
// std::invalid_argument becomes ValueError in Python. Addresses cannot be proved to be the caller's; all else is.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace safecrit {

constexpr int64_t kMostBytes = int64_t{1} << 56;  // more than any address space; sums of a few stay in 64 bits

inline void require(bool condition, const std::string& problem) {
    if (!condition) throw std::invalid_argument(problem);
}

// A stretch of memory of `count` elements of `item` bytes. `written`: nothing else may share it.
struct Memory {
    const char* name;
    const void* data;
    int64_t count, item;
    bool written;
};

inline void check_memory(const Memory& memory) {
    const std::string name = memory.name;
    require(memory.count >= 0 && memory.count <= kMostBytes / memory.item, name + ": bad size");
    require(memory.count == 0 || memory.data != nullptr, name + ": null pointer");
    const auto address = reinterpret_cast<uintptr_t>(memory.data);
    require(address % static_cast<uintptr_t>(memory.item) == 0, name + ": misaligned pointer");
    require(address <= UINTPTR_MAX - static_cast<uintptr_t>(memory.count * memory.item), name + ": bad pointer");
}

inline void check_memories(std::initializer_list<Memory> memories) {
    for (const Memory& one : memories) check_memory(one);
    for (const Memory& one : memories) {
        for (const Memory& other : memories) {
            if (&one == &other || !one.written || one.count == 0 || other.count == 0) continue;
            const auto a = reinterpret_cast<uintptr_t>(one.data), b = reinterpret_cast<uintptr_t>(other.data);
            const bool apart = a + static_cast<uintptr_t>(one.count * one.item) <= b ||
                               b + static_cast<uintptr_t>(other.count * other.item) <= a;
            require(apart, std::string(one.name) + " and " + other.name + " share memory");
        }
    }
}

inline Dtype check_dtype(int code) {
    require(code >= 0 && code <= 2, "unknown dtype code " + std::to_string(code));
    return static_cast<Dtype>(code);
}

inline void check_threads(int threads) { require(threads >= 1 && threads <= 4096, "threads must be from 1 to 4096"); }

// Product of sizes that are not negative; ValueError where it leaves what can be addressed.
inline int64_t checked_product(int64_t left, int64_t right) {
    require(left >= 0 && right >= 0, "negative size or stride");
    require(left == 0 || right <= kMostBytes / left, "sizes and strides are too large");
    return left * right;
}

}  // namespace safecrit
