// Splitting a loop over plain threads.
//
// No OpenMP: torch brings a runtime of its own, and two of them in one process
// fight over cores. Threads live for one call, so a forked process is safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace safecrit {

// Elements below which starting a thread (some 20 us) costs more than it saves.
constexpr int64_t kElementsPerThread = int64_t{1} << 17;

// Calls body(begin, end, part) on disjoint parts of [0, count); `count` is counted in units of `unit` elements.
// Returns the number of parts, at most `threads`. The calling thread takes the last part.
template <typename Body>
int parallel_for(int64_t count, int64_t unit, int threads, const Body& body) {
    const int64_t wanted = std::max<int64_t>(1, count * std::max<int64_t>(unit, 1) / kElementsPerThread);
    const int parts = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, wanted, count})));
    std::vector<std::thread> workers;
    workers.reserve(static_cast<size_t>(parts - 1));
    for (int part = 0; part < parts; ++part) {
        const int64_t begin = count / parts * part + std::min<int64_t>(part, count % parts);
        const int64_t end = begin + count / parts + (part < count % parts ? 1 : 0);
        if (part + 1 < parts) {
            try {
                workers.emplace_back([&body, begin, end, part] { body(begin, end, part); });
            } catch (const std::system_error&) {  // the system allows no further thread
                body(begin, end, part);
            }
        } else {
            body(begin, end, part);
        }
    }
    for (auto& worker : workers) worker.join();
    return parts;
}

}  // namespace safecrit
