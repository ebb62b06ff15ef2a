// SPDX-License-Identifier: Apache-2.0
// A compiled append kernel as the dispatcher sees it. The rows come from src/kernels.cmake.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "bitdecoding/layout/page_config.hpp"
#include "bitdecoding/quantize/append_problem.hpp"

namespace bitdecoding {

struct AppendRow {
  layout::PageConfig config;
  const char* name;
  cudaError_t (*launch)(const AppendProblem& problem, int* counters, cudaStream_t stream,
                        int* error_word);
};

// Every row of the build, unit by unit.
std::span<const std::span<const AppendRow>> append_rows();

}  // namespace bitdecoding
