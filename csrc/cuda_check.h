// Checked CUDA calls, and the device they run on.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace safecrit {

inline void cuda_check(cudaError_t status, const char* what, const char* file, int line) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + file + ":" +
                             std::to_string(line) + ")");
}

#define SAFECRIT_CUDA_CHECK(call) ::safecrit::cuda_check((call), #call, __FILE__, __LINE__)

// Makes `device` current for a scope. Our runtime is linked statically and shares the device's primary context
// with torch, but keeps its own idea of the current device.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        SAFECRIT_CUDA_CHECK(cudaGetDevice(&before_));
        if (before_ != device) SAFECRIT_CUDA_CHECK(cudaSetDevice(device));
        changed_ = before_ != device;
    }
    ~DeviceGuard() {
        if (changed_) (void)cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace safecrit
