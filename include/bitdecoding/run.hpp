// SPDX-License-Identifier: Apache-2.0
// The compiled library: operations on a CPU, and on a CUDA stream where the build has kernels.
// Nothing here allocates device memory or synchronises. On an error nothing has been written.
#pragma once

#include <string>
#include <vector>

#include "bitdecoding/cache/device_error.hpp"
#include "bitdecoding/decode/decode_plan.hpp"
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
  // Device int32 [4] or nullptr: what was first found wrong in device memory (device_error.hpp).
  // The caller zeroes it before and reads it after.
  int* error_word = nullptr;
};

// CPU: page ids, lengths and slots are checked before anything is written.
Status pack_pages(const PackProblem& problem, const CpuExecution& execution);
Status append_tokens(const AppendProblem& problem, const CpuExecution& execution);
Status decode_attention(const DecodeProblem& problem, const CpuExecution& execution);

// CUDA: enqueued on the stream, capturable; k, v, q and out must be fp16 or bf16. Page ids, lengths
// and slots are checked on the device (see CudaExecution::error_word).
Status pack_pages(const PackProblem& problem, const CudaExecution& execution);

// `counters`: device int32 [batch], zero before the first call; every call leaves them zero.
Status append_tokens(const AppendProblem& problem, int* counters, const CudaExecution& execution);

// The row of the kernel table that plan_decode chooses on a device of that compute capability (90:
// 9.0); needs no device. `columns` = query tokens * query heads per KV head.
Status choose_decode_kernel(const KvFormat& format, int columns, int compute_capability,
                            const char** kernel);

// A plan for the device of `execution`. `kernel` names a row of the kernel table, nullptr chooses
// one (choose_decode_kernel).
Status plan_decode(const KvFormat& format, int columns, const char* kernel,
                   const CudaExecution& execution, decode::DecodePlan* plan);

// `workspace`: plan.workspace_bytes of device memory, 16-byte aligned, whose first
// decode::kCounterBytes are zero before the first call. Calls that overlap in time need one each.
Status decode_attention(const DecodeProblem& problem, const decode::DecodePlan& plan,
                        void* workspace, const CudaExecution& execution);

// Checks the cache's device state on the host: page ids, slots, lengths, packed (CPU memory only).
Status check_state(const PagedKvCache& cache);

}  // namespace bitdecoding
