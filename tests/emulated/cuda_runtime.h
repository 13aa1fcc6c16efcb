// CUDA kernels on the CPU, for the tests: as much of CUDA's header as csrc/ uses.
//
// Blocks run one after another. Each thread of a block is a coroutine that runs until it waits for its block or its
// warp; both directions of the order in which threads and blocks run are used by turns, so that a missing barrier is
// likely to show. A barrier that some threads of its block or warp do not reach is an exception. Warps must be whole.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
    std::memset(data, value, bytes);
    return cudaSuccess;
}

struct dim3 {
    unsigned x;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr unsigned kWarp = 32;
class Block {
public:
    void run(unsigned threads, const std::function<void()>& kernel) {
        while (fibers_.size() < threads) fibers_.emplace_back(new Fiber);
        kernel_ = &kernel;
        threads_ = threads;
        for (unsigned i = 0; i < threads; ++i) fibers_[i]->state = State::ready;
        for (bool backwards = false; !all(0, threads, State::finished); backwards = !backwards) {
            bool ran = false;
            for (unsigned i = 0; i < threads; ++i) {
                const unsigned own = backwards ? threads - 1 - i : i;
                if (fibers_[own]->state != State::ready) continue;
                ran = true;
                enter(own);
            }
            for (unsigned warp = 0; warp < threads; warp += kWarp) release(warp, warp + kWarp, State::at_warp);
            release(0, threads, State::at_block);
            if (!ran) {
                fibers_.clear();  // their stacks still hold the kernel
                throw std::runtime_error("a barrier that not all threads reach");
            }
        }
    }

    void wait() { leave(State::at_block); }
    unsigned lane() const { return current_ % kWarp; }

    // What each lane of this warp gives.
    std::array<uint64_t, kWarp> exchange(uint64_t value) {
        const unsigned first = current_ - lane();
        fibers_[current_]->given = value;
        leave(State::at_warp);
        std::array<uint64_t, kWarp> given;
        for (unsigned i = 0; i < kWarp; ++i) given[i] = fibers_[first + i]->given;
        leave(State::at_warp);
        return given;
    }

private:
    enum class State { ready, at_warp, at_block, finished };

    struct Fiber {
        static constexpr size_t kStack = size_t{1} << 16;
        std::unique_ptr<char[]> stack{new char[kStack]};
        ucontext_t first;
        jmp_buf place;
        bool started = false;
        State state = State::finished;
        uint64_t given = 0;
    };

    bool all(unsigned begin, unsigned end, State state) const {
        const auto is = [&](const auto& fiber) { return fiber->state == state; };
        return std::all_of(fibers_.begin() + begin, fibers_.begin() + end, is);
    }

    void release(unsigned begin, unsigned end, State state) {
        if (!all(begin, end, state)) return;
        for (unsigned i = begin; i < end; ++i) fibers_[i]->state = State::ready;
    }

    void enter(unsigned thread) {
        current_ = threadIdx.x = thread;
        if (_setjmp(home_) != 0) return;
        Fiber& fiber = *fibers_[thread];
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = fiber.stack.get();
        fiber.first.uc_stack.ss_size = Fiber::kStack;
        makecontext(&fiber.first, &Block::body, 0);
        setcontext(&fiber.first);
    }

    void leave(State state) {
        Fiber& fiber = *fibers_[current_];
        fiber.state = state;
        if (_setjmp(fiber.place) == 0) _longjmp(home_, 1);
    }

    static void body();

    std::vector<std::unique_ptr<Fiber>> fibers_;
    const std::function<void()>* kernel_ = nullptr;
    unsigned threads_ = 0, current_ = 0;
    jmp_buf home_;
};

inline Block block;

inline void Block::body() {
    for (;;) {
        (*block.kernel_)();
        block.leave(State::finished);
    }
}

// kernel<<<grid, threads, shared, stream>>>(...) is rewritten to launch(kernel, grid, threads, shared, stream)(...).
template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), unsigned grid, unsigned threads, size_t, cudaStream_t) {
    return [=](Parameters... given) {
        static bool backwards = false;
        if (threads % kWarp != 0 || grid == 0) throw std::runtime_error("bad launch");
        gridDim.x = grid;
        blockDim.x = threads;
        const std::function<void()> run = [&] { kernel(given...); };
        for (unsigned i = 0; i < grid; ++i) {
            blockIdx.x = backwards ? grid - 1 - i : i;
            block.run(threads, run);
        }
        backwards = !backwards;
    };
}

}  // namespace emulated

inline void __syncthreads() { emulated::block.wait(); }
inline unsigned __ballot_sync(unsigned, bool predicate) {
    unsigned bits = 0, lane = 0;
    for (const uint64_t one : emulated::block.exchange(predicate)) bits |= static_cast<unsigned>(one) << lane++;
    return bits;
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    unsigned sum = 0;
    for (const uint64_t one : emulated::block.exchange(value)) sum += static_cast<unsigned>(one);
    return sum;
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
    const unsigned lane = emulated::block.lane();
    const auto all = emulated::block.exchange(static_cast<uint64_t>(value));
    return lane < by ? value : static_cast<T>(all[lane - by]);
}
template <typename T>
T __shfl_sync(unsigned, T value, unsigned from) {
    return static_cast<T>(emulated::block.exchange(static_cast<uint64_t>(value))[from]);
}

template <typename T>
T atomicAdd(T* place, T value) {
    const T before = *place;
    *place += value;
    return before;
}
template <typename T>
T __ldg(const T* place) {
    return *place;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
using std::isfinite;
using std::min;
