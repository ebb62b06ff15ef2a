// SPDX-License-Identifier: Apache-2.0
// Dispatch of the CUDA pack: checks, the row of the kernel table, the device of the pointers.
#include <cuda_runtime_api.h>

#include <string>

#include "bitdecoding/build_info.hpp"
#include "bitdecoding/run.hpp"
#include "cuda/pack_row.hpp"

namespace bitdecoding {
namespace {

// Makes a device current for one call; the caller's device is current again afterwards.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && device != previous_) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

Status cuda_status(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return {};
  std::ostringstream text;
  text << kernel << ": " << cudaGetErrorName(error) << ": " << cudaGetErrorString(error);
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

}  // namespace

std::string cuda_driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "";
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Status pack_pages(const PackProblem& problem, const CudaExecution& execution) {
  if (Status status = validate_for_cuda(problem); !status.is_ok()) return status;
  const PackRow* row = find_pack_row(layout::page_config(problem.format));
  if (row == nullptr) {
    std::string text = "format = " + name(problem.format) + "; kernels of this build:";
    for (const std::string& kernel : build_info().kernels) text += " " + kernel;
    return Status(StatusCode::unsupported, text);
  }
  const DeviceScope scope(execution.device);
  if (scope.error() != cudaSuccess) return cuda_status(scope.error(), row->name);
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  return cuda_status(row->launch(problem, stream, execution.error_word), row->name);
}

}  // namespace bitdecoding
