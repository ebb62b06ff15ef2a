// SPDX-License-Identifier: Apache-2.0
// A compiled decode kernel as the dispatcher sees it. The rows come from src/kernels.cmake.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "bitdecoding/decode/decode_plan.hpp"
#include "bitdecoding/decode/decode_problem.hpp"

namespace bitdecoding {

struct DecodeRow {
  decode::DecodeConfig config;
  const char* name;
  cudaError_t (*plan)(const KvFormat& format, decode::DecodePlan* plan);
  cudaError_t (*launch)(const DecodeProblem& problem, const decode::DecodePlan& plan,
                        std::uint8_t* workspace, cudaStream_t stream, int* error_word);
};

// Every row of the build, unit by unit.
std::span<const std::span<const DecodeRow>> decode_rows();

}  // namespace bitdecoding
