// SPDX-License-Identifier: Apache-2.0
// Memory of the current device, and errors as exceptions: what the benchmarks in C++ share.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "bitdecoding/status.hpp"

namespace bitdecoding::bench {

inline void check(const Status& status) {
  if (!status.is_ok()) throw std::runtime_error(status.text());
}

inline void check(cudaError_t error, const char* operation) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(error));
  }
}

class DeviceMemory {
 public:
  // Zeros.
  explicit DeviceMemory(std::size_t bytes) : bytes_(std::max<std::size_t>(bytes, 16)) {
    check(cudaMalloc(&data_, bytes_), "cudaMalloc");
    check(cudaMemset(data_, 0, bytes_), "cudaMemset");
  }
  // `bytes` that repeat `pattern`.
  template <class T>
  DeviceMemory(std::span<const T> pattern, std::size_t bytes) : DeviceMemory(bytes) {
    std::size_t done = std::min(bytes, pattern.size_bytes());
    check(cudaMemcpy(data_, pattern.data(), done, cudaMemcpyHostToDevice), "cudaMemcpy");
    while (done < bytes) {
      const std::size_t next = std::min(done, bytes - done);
      check(cudaMemcpy(at<char>(done), data_, next, cudaMemcpyDeviceToDevice), "cudaMemcpy");
      done += next;
    }
  }
  template <class T>
  explicit DeviceMemory(const std::vector<T>& values)
      : DeviceMemory(std::span<const T>(values), values.size() * sizeof(T)) {}
  ~DeviceMemory() { (void)cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::size_t bytes() const { return bytes_; }
  void* data() const { return data_; }
  template <class T>
  T* at(std::size_t index) const {
    return static_cast<T*>(data_) + index;
  }

 private:
  std::size_t bytes_;
  void* data_ = nullptr;
};

}  // namespace bitdecoding::bench
