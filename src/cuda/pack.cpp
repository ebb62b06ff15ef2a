// SPDX-License-Identifier: Apache-2.0
// Dispatch of the CUDA pack: checks, the row of the kernel table, the device of the pointers.
#include "bitdecoding/run.hpp"
#include "cuda/launch.hpp"
#include "cuda/pack_row.hpp"

namespace bitdecoding {
namespace {

const PackRow* find_row(const layout::PageConfig& config) {
  for (const auto& unit : pack_rows()) {
    for (const PackRow& row : unit) {
      if (row.config == config) return &row;
    }
  }
  return nullptr;
}

}  // namespace

Status pack_pages(const PackProblem& problem, const CudaExecution& execution) {
  if (Status status = validate_for_cuda(problem); !status.is_ok()) return status;
  const PackRow* row = find_row(layout::page_config(problem.format));
  if (row == nullptr) return no_kernel("format = " + name(problem.format));
  const DeviceScope scope(execution.device);
  if (scope.error() != cudaSuccess) return cuda_status(scope.error(), row->name);
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  return cuda_status(row->launch(problem, stream, execution.error_word), row->name);
}

}  // namespace bitdecoding
