// SPDX-License-Identifier: Apache-2.0
// Launch of the append kernel on the current device: header users instantiate it with a row of
// their own, the library with the rows of its table.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "bitdecoding/launch.cuh"
#include "bitdecoding/quantize/append_kernel.cuh"

namespace bitdecoding::quantize {

// The problem must have passed validate_for_cuda(). Enqueues one kernel; `counters`: device int32
// [batch], zero before and after.
template <class Row>
cudaError_t launch_append(const AppendProblem& problem, int* counters, cudaStream_t stream,
                          int* error_word) {
  const PagedKvCache& c = problem.cache;
  if (c.batch == 0) return cudaSuccess;
  const int new_pages = most_new_pages(c, problem.runs.row_tokens);
  const std::int64_t ctas = (1 + 2 * std::int64_t{new_pages}) * c.num_kv_heads;  // of a sequence
  if (ctas > INT_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(c.batch));
  constexpr int kSmem_bytes = sizeof(AppendStorage<Row::config.head_dim>);
  if (const cudaError_t error = allow_shared<kSmem_bytes>(append_tokens<Row>);
      error != cudaSuccess) {
    return error;
  }
  const layout::PageRecord record(c.format);
  return launch(append_tokens<Row>, grid, kPackThreads, kSmem_bytes, stream, problem, record,
                counters, error_word);
}

}  // namespace bitdecoding::quantize
