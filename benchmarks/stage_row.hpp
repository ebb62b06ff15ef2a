// SPDX-License-Identifier: Apache-2.0
// The stages of a decode kernel as stages.cpp sees them.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "bitdecoding/decode/decode_plan.hpp"
#include "bitdecoding/decode/decode_problem.hpp"

namespace bitdecoding::bench {

// What is left of a kernel; launched by the plan of the whole one.
struct Stage {
  const char* name;
  cudaError_t (*launch)(const DecodeProblem& problem, const decode::DecodePlan& plan,
                        std::uint8_t* workspace, cudaStream_t stream, int* error_word);
};

struct StageRow {
  const char* kernel;  // in the kernel table
  decode::DecodeConfig config;
  std::vector<Stage> stages;
};

// Those of the build.
std::vector<StageRow> stage_rows();

}  // namespace bitdecoding::bench
