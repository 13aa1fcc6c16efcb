// The arguments that select_top has on every device, checked.
#pragma once

#include "check.h"
#include "select_top.h"

namespace safecrit {

// Number of entries of all tensors; std::invalid_argument where something is wrong.
inline int64_t checked_total(const SelectTopArgs& args) {
    const auto refuse = [](const std::string& problem) { throw std::invalid_argument("select_top: " + problem); };
    const auto aligned = [](const void* pointer, int64_t item) {
        return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(item) == 0;
    };
    if (args.sizes.size() != args.data.size() || args.dtypes.size() != args.data.size()) {
        refuse("as many pointers as sizes and dtypes are needed");
    }
    int64_t total = 0;
    for (size_t i = 0; i < args.data.size(); ++i) {
        const std::string where = "tensor " + std::to_string(i);
        const int dtype = static_cast<int>(args.dtypes[i]);
        if (dtype < 0 || dtype > 2) refuse(where + ": unknown dtype code " + std::to_string(dtype));
        if (args.sizes[i] < 0) refuse(where + ": its size is negative");
        if (args.sizes[i] > (int64_t{1} << 60) - total) refuse("more than 2^60 entries");
        if (args.sizes[i] > 0 && args.data[i] == nullptr) refuse(where + ": null pointer");
        if (!aligned(args.data[i], item_size(args.dtypes[i]))) refuse(where + ": misaligned pointer");
        total += args.sizes[i];
    }
    if (args.k < 0 || args.k > total) {
        refuse("k is " + std::to_string(args.k) + ", there are " + std::to_string(total) + " entries");
    }
    if (args.k > 0 && args.out == nullptr) refuse("null output");
    if (!args.sizes.empty() && args.counts == nullptr) refuse("null counts");
    if (!aligned(args.out, 8) || !aligned(args.counts, 8)) refuse("misaligned output");
    return total;
}

}  // namespace safecrit
