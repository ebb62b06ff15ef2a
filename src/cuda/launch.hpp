// SPDX-License-Identifier: Apache-2.0
// What every CUDA entry point does around its kernel: the device of the pointers, errors as Status.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "bitdecoding/status.hpp"

namespace bitdecoding {

// Makes a device current for one call; the caller's device is current again afterwards.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

// `operation` begins the text of an error: a kernel's name or a function's.
Status cuda_status(cudaError_t error, const char* operation);

// The error of a format or shape without a kernel: what was asked for, and what is built.
Status no_kernel(const std::string& wanted);

}  // namespace bitdecoding
