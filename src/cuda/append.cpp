// SPDX-License-Identifier: Apache-2.0
// Dispatch of the CUDA append: checks, the row of the kernel table, the device of the pointers.
#include "bitdecoding/run.hpp"
#include "cuda/append_row.hpp"
#include "cuda/launch.hpp"

namespace bitdecoding {
namespace {

const AppendRow* find_row(const layout::PageConfig& config) {
  for (const auto& unit : append_rows()) {
    for (const AppendRow& row : unit) {
      if (row.config == config) return &row;
    }
  }
  return nullptr;
}

}  // namespace

Status append_tokens(const AppendProblem& problem, int* counters, const CudaExecution& execution) {
  if (Status status = validate_for_cuda(problem); !status.is_ok()) return status;
  if (counters == nullptr && problem.cache.batch > 0) {
    return invalid_argument("counters = null; allowed: an array [B]");
  }
  const AppendRow* row = find_row(layout::page_config(problem.cache.format));
  if (row == nullptr) return no_kernel("format = " + name(problem.cache.format));
  const DeviceScope scope(execution.device);
  if (scope.error() != cudaSuccess) return cuda_status(scope.error(), row->name);
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  return cuda_status(row->launch(problem, counters, stream, execution.error_word), row->name);
}

}  // namespace bitdecoding
