// SPDX-License-Identifier: Apache-2.0
// Plans and launches of CUDA decode: checks, the row of the kernel table, the device of the
// pointers.
#include <cstring>

#include "bitdecoding/decode/choice.hpp"
#include "bitdecoding/run.hpp"
#include "cuda/decode_row.hpp"
#include "cuda/launch.hpp"

namespace bitdecoding {
namespace {

using decode::DecodePlan;

const DecodeRow* find_row(const KvFormat& format, const char* name) {
  for (const auto& unit : decode_rows()) {
    for (const DecodeRow& row : unit) {
      if (decode::serves(row.config, format) && std::strcmp(row.name, name) == 0) return &row;
    }
  }
  return nullptr;
}

const DecodeRow* find_row(const decode::DecodeConfig& config) {
  for (const auto& unit : decode_rows()) {
    for (const DecodeRow& row : unit) {
      if (row.config == config) return &row;
    }
  }
  return nullptr;
}

cudaError_t read_compute_capability(int device, int* capability) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *capability = 10 * major + minor;
  return error;
}

std::string wanted(const KvFormat& format, int columns, const char* kernel) {
  std::string text = "format = " + name(format) + ", query columns = " + std::to_string(columns);
  return kernel == nullptr ? text : text + ", kernel = " + kernel;
}

}  // namespace

Status choose_decode_kernel(const KvFormat& format, int columns, int compute_capability,
                            const char** kernel) {
  if (Status status = validate(format); !status.is_ok()) return status;
  if (columns < 1) return invalid_argument("columns = ", columns, "; allowed: 1 or more");
  if (compute_capability < 80) {
    return invalid_argument("compute capability = ", compute_capability, "; allowed: 80 or more");
  }
  const decode::Arch arch = decode::arch_of(compute_capability);
  const DecodeRow* row = decode::choose_decode_row(decode_rows(), arch, format, columns);
  if (row == nullptr) {
    return no_kernel(wanted(format, columns, nullptr) +
                     ", compute capability = " + std::to_string(compute_capability));
  }
  *kernel = row->name;
  return {};
}

Status plan_decode(const KvFormat& format, int columns, const char* kernel,
                   const CudaExecution& execution, DecodePlan* plan) {
  if (Status status = validate(format); !status.is_ok()) return status;
  if (columns < 1) return invalid_argument("columns = ", columns, "; allowed: 1 or more");
  const DeviceScope scope(execution.device);
  if (scope.error() != cudaSuccess) return cuda_status(scope.error(), "plan_decode");
  if (kernel == nullptr) {
    int capability = 0;
    const cudaError_t error = read_compute_capability(execution.device, &capability);
    if (error != cudaSuccess) return cuda_status(error, "plan_decode");
    Status status = choose_decode_kernel(format, columns, capability, &kernel);
    if (!status.is_ok()) return status;
  }
  const DecodeRow* row = find_row(format, kernel);
  if (row == nullptr) return no_kernel(wanted(format, columns, kernel));
  const cudaError_t error = row->plan(format, plan);
  plan->kernel = row->name;
  return cuda_status(error, row->name);
}

Status decode_attention(const DecodeProblem& problem, const DecodePlan& plan, void* workspace,
                        const CudaExecution& execution) {
  if (Status status = validate_for_cuda(problem); !status.is_ok()) return status;
  if (!(plan.format == problem.cache.format) || plan.device != execution.device) {
    return invalid_argument("plan for ", name(plan.format), " on device ", plan.device,
                            "; allowed: ", name(problem.cache.format), " on device ",
                            execution.device);
  }
  if (problem.cache.batch == 0 || problem.query_tokens == 0) return {};
  if (workspace == nullptr || reinterpret_cast<std::uintptr_t>(workspace) % 16 != 0) {
    return invalid_argument("workspace = ", workspace, "; allowed: a multiple of 16, of ",
                            plan.workspace_bytes, " bytes");
  }
  const DecodeRow* row = find_row(plan.config);
  if (row == nullptr) {
    return no_kernel(wanted(plan.format, plan.config.query_columns, plan.kernel));
  }
  const DeviceScope scope(execution.device);
  if (scope.error() != cudaSuccess) return cuda_status(scope.error(), plan.kernel);
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  return cuda_status(row->launch(problem, plan, static_cast<std::uint8_t*>(workspace), stream,
                                 execution.error_word),
                     plan.kernel);
}

}  // namespace bitdecoding
