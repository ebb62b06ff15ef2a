// SPDX-License-Identifier: Apache-2.0
// A compiled pack kernel as the dispatcher sees it. The rows come from src/kernels.cmake.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "bitdecoding/layout/page_config.hpp"
#include "bitdecoding/quantize/pack_problem.hpp"

namespace bitdecoding {

struct PackRow {
  layout::PageConfig config;
  const char* name;
  cudaError_t (*launch)(const PackProblem& problem, cudaStream_t stream, int* error_word);
};

// Every row of the build, unit by unit.
std::span<const std::span<const PackRow>> pack_rows();

}  // namespace bitdecoding
