// SPDX-License-Identifier: Apache-2.0
// From a row of the kernel table to its stages.
#pragma once

#include "bitdecoding/decode/launch.cuh"
#include "stage_row.hpp"
#include "stage_streams.cuh"

namespace bitdecoding::bench {

using layout::PageConfig;

template <class Row, template <DecodeConfig, class> class StreamOf>
__global__ void __launch_bounds__(max_warps(Row::config) * 32, 1)
    decode_stage(const __grid_constant__ DecodeArguments arguments) {
  extern __shared__ __align__(128) std::uint8_t smem[];
  DecodeCta<Row::config, StreamOf>(arguments, smem).run();
}

template <class Row, template <DecodeConfig, class> class StreamOf>
cudaError_t launch_stage(const DecodeProblem& problem, const DecodePlan& plan,
                         std::uint8_t* workspace, cudaStream_t stream, int* error_word) {
  const auto kernel = decode_stage<Row, StreamOf>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, static_cast<unsigned>(plan.ctas), plan.warps * 32, plan.smem_bytes, stream,
                decode_arguments(problem, plan, workspace, error_word));
}

template <class Row>
StageRow make_stage_row() {
  return {Row::name,
          Row::config,
          {{"copy", &launch_stage<Row, CopyOnly>},
           {"copy_unpack", &launch_stage<Row, CopyAndUnpack>},
           {"without_softmax", &launch_stage<Row, WithoutSoftmax>}}};
}

}  // namespace bitdecoding::bench
