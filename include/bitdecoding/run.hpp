// SPDX-License-Identifier: Apache-2.0
// The compiled library: operations on a CPU, and on a CUDA stream where the build has kernels.
// Nothing here allocates device memory or synchronises. On an error nothing has been written.
#pragma once

#include <string>
#include <vector>

#include "bitdecoding/decode/decode_problem.hpp"
#include "bitdecoding/quantize/append_problem.hpp"
#include "bitdecoding/quantize/pack_problem.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

struct CpuExecution {
  int threads = 0;  // 0: one per hardware thread
};

struct CudaExecution {
  int device = 0;          // the device that holds every pointer of the problem
  void* stream = nullptr;  // cudaStream_t
  // Device int32 [4] or nullptr: sequence + 1, value, limit and PackError of the first bad index
  // found in device memory. The caller zeroes it before and reads it after.
  int* error_word = nullptr;
};

// CPU: page ids, lengths and slots are checked before anything is written.
Status pack_pages(const PackProblem& problem, const CpuExecution& execution);
Status append_tokens(const AppendProblem& problem, const CpuExecution& execution);
Status decode_attention(const DecodeProblem& problem, const CpuExecution& execution);

// CUDA: enqueued on the stream; k and v must be fp16 or bf16.
Status pack_pages(const PackProblem& problem, const CudaExecution& execution);

// Checks the cache's device state on the host: page ids, slots, lengths, packed (CPU memory only).
Status check_state(const PagedKvCache& cache);

}  // namespace bitdecoding
