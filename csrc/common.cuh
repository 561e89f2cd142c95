#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace grpo {

// Throws on a failed CUDA call; after a launch use GRPO_CUDA_CHECK(cudaGetLastError()).
#define GRPO_CUDA_CHECK(call)                                                                  \
  do {                                                                                         \
    const cudaError_t status = (call);                                                         \
    if (status != cudaSuccess) {                                                               \
      throw std::runtime_error(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " + \
                               #call + ": " + cudaGetErrorName(status) + ": " +                \
                               cudaGetErrorString(status));                                    \
    }                                                                                          \
  } while (0)

// Makes `device` current for a scope. The caller names it: our CUDA runtime is linked statically,
// and what torch's own copy holds current is not ours to rely on.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    GRPO_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_) GRPO_CUDA_CHECK(cudaSetDevice(device));
  }
  // Only what changed: cudaSetDevice also makes a context on the device it names.
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

// 16 bytes of T: the widest load and store of one thread.
template <typename T>
struct alignas(16) Vec16 {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

template <typename T>
__device__ inline bool is_aligned16(const T* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

// Largest s in [low, high] with cu_seqlens[s] <= row. The state is two registers; empty sequences
// are passed over because the largest such s starts last.
__device__ inline int find_sequence(const int32_t* cu_seqlens, int low, int high, int64_t row) {
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (cu_seqlens[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace grpo
