// SPDX-License-Identifier: Apache-2.0
// Launch of the pack kernel on the current device: header users instantiate it with a row of their
// own, the library with the rows of its table.
#pragma once

#include <cuda_runtime.h>

#include "bitdecoding/launch.cuh"
#include "bitdecoding/quantize/pack_kernel.cuh"

namespace bitdecoding::quantize {

// The problem must have passed validate_for_cuda(). Enqueues one kernel.
template <class Row>
cudaError_t launch_pack(const PackProblem& problem, cudaStream_t stream, int* error_word) {
  const int pages = problem.runs.row_tokens / problem.format.page_tokens;  // of the longest row
  if (pages == 0 || problem.runs.batch == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(pages) * static_cast<unsigned>(problem.num_kv_heads),
                  static_cast<unsigned>(problem.runs.batch));
  constexpr int kSmem_bytes = sizeof(PackStorage<Row::config.head_dim>);
  if (const cudaError_t error = allow_shared<kSmem_bytes>(pack_pages<Row>); error != cudaSuccess) {
    return error;
  }
  const layout::PageRecord record(problem.format);
  return launch(pack_pages<Row>, grid, kPackThreads, kSmem_bytes, stream, problem, record,
                error_word);
}

}  // namespace bitdecoding::quantize
