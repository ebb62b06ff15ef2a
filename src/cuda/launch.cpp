// SPDX-License-Identifier: Apache-2.0
#include "cuda/launch.hpp"

#include <sstream>

#include "bitdecoding/build_info.hpp"

namespace bitdecoding {

DeviceScope::DeviceScope(int device) {
  error_ = cudaGetDevice(&previous_);
  if (error_ == cudaSuccess && device != previous_) {
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
}

DeviceScope::~DeviceScope() {
  if (changed_) (void)cudaSetDevice(previous_);
}

Status cuda_status(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();  // reported here: the caller's own checks shall not find it
  std::ostringstream text;
  text << operation << ": " << cudaGetErrorName(error) << ": " << cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    const std::string found = cuda_driver_version();
    text << "; driver found: " << (found.empty() ? "none" : "CUDA " + found) << ", needed: CUDA "
         << CUDART_VERSION / 1000 << ".0 or newer";
  }
  if (error == cudaErrorNoKernelImageForDevice) {
    text << "; built for: " << build_info().architectures;
    return Status(StatusCode::unsupported, text.str());
  }
  return Status(StatusCode::cuda_error, text.str());
}

Status no_kernel(const std::string& wanted) {
  std::string text = wanted + "; kernels of this build:";
  for (const std::string& kernel : build_info().kernels) text += " " + kernel;
  return Status(StatusCode::unsupported, text);
}

std::string cuda_driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "";
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace bitdecoding
