// SPDX-License-Identifier: Apache-2.0
// Plans and launches of CUDA decode: checks, the row of the kernel table, the device of the pointers.
#include <cstring>

#include "bitdecoding/run.hpp"
#include "cuda/decode_row.hpp"
#include "cuda/launch.hpp"

namespace bitdecoding {
namespace {

using decode::Arch;
using decode::DecodePlan;

// The row of that name; without a name the narrowest for a device of `arch` that holds all columns,
// or the widest.
const DecodeRow* find_row(const layout::PageConfig& page, int columns, const char* kernel,
                          Arch arch) {
  const DecodeRow* found = nullptr;
  for (const auto& unit : decode_rows()) {
    for (const DecodeRow& row : unit) {
      if (!(row.config.page == page)) continue;
      if (kernel != nullptr) {
        if (std::strcmp(row.name, kernel) == 0) return &row;
      } else if (row.config.arch == arch &&
                 (found == nullptr || found->config.query_columns < columns)) {
        found = &row;  // rows of one page format come in order of their columns
      }
    }
  }
  return found;
}

const DecodeRow* find_row(const decode::DecodeConfig& config) {
  for (const auto& unit : decode_rows()) {
    for (const DecodeRow& row : unit) {
      if (row.config == config) return &row;
    }
  }
  return nullptr;
}

cudaError_t device_arch(int device, Arch* arch) {
  int major = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  *arch = major == 9 ? Arch::sm90 : Arch::sm80;
  return error;
}

std::string wanted(const KvFormat& format, int columns, const char* kernel) {
  std::string text = "format = " + name(format) + ", query columns = " + std::to_string(columns);
  return kernel == nullptr ? text : text + ", kernel = " + kernel;
}

}  // namespace

Status plan_decode(const KvFormat& format, int columns, const char* kernel,
                   const CudaExecution& execution, DecodePlan* plan) {
  if (Status status = validate(format); !status.is_ok()) return status;
  if (columns < 1) return invalid_argument("columns = ", columns, "; allowed: 1 or more");
  const DeviceScope scope(execution.device);
  if (scope.error() != cudaSuccess) return cuda_status(scope.error(), "plan_decode");
  Arch arch = Arch::sm80;
  if (const cudaError_t error = device_arch(execution.device, &arch); error != cudaSuccess) {
    return cuda_status(error, "plan_decode");
  }
  const DecodeRow* row = find_row(layout::page_config(format), columns, kernel, arch);
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
