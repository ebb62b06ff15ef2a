// SPDX-License-Identifier: Apache-2.0
// Plan and launch of the decode kernel on the current device. The plan depends on shapes and the
// device only, never on lengths: made once, it serves every step and every captured graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "bitdecoding/decode/kernel.cuh"

namespace bitdecoding::decode {

struct DecodePlan {
  int ctas = 0;
  int warps = 0;   // per CTA
  int stages = 0;  // per warp
  int stage_bytes = 0;
  int smem_bytes = 0;
  std::size_t workspace_bytes = 0;  // partials, then counters; zero the counters once
  std::size_t counters_offset = 0;
};

// Shared memory a CTA may use: 99 KB everywhere from 8.0 to 8.9, 227 KB on 9.0.
constexpr int shared_limit_bytes(Arch arch) { return (arch == Arch::sm90 ? 227 : 99) * 1024; }

template <class Row>
cudaError_t plan_decode(const KvFormat& format, DecodePlan* plan) {
  constexpr DecodeConfig config = Row::config;
  using S = Shape<config>;
  const layout::PageRecord record(format);
  plan->stage_bytes =
      layout::round_up(std::max(record.chunk(1), zone_tile_bytes(config.page.head_dim)), 128);
  const int limit = shared_limit_bytes(config.arch);
  for (plan->warps = kMaxWarps<config>;; plan->warps -= 4) {
    const int fixed = static_cast<int>(sizeof(CtaStorage) + plan->warps * sizeof(WarpStorage));
    plan->stages = std::min(kMostStages, (limit - fixed) / (plan->warps * plan->stage_bytes));
    plan->smem_bytes = plan->warps * plan->stages * plan->stage_bytes + fixed;
    if (plan->stages >= 2 || plan->warps == 4) break;
  }
  const auto kernel = decode_attention<Row>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan->smem_bytes);
  if (error != cudaSuccess) return error;
  int device = 0, sms = 0, per_sm = 0;
  if (error = cudaGetDevice(&device); error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, plan->warps * 32,
                                                        plan->smem_bytes);
  if (error != cudaSuccess) return error;
  plan->ctas = sms * per_sm;
  plan->counters_offset = plan->ctas * (plan->warps + 2) * sizeof(Partial<S>);
  plan->workspace_bytes = plan->counters_offset + plan->ctas * sizeof(int);
  return cudaSuccess;
}

template <class Row>
cudaError_t launch_decode(const DecodeProblem& problem, const DecodePlan& plan,
                          std::uint8_t* workspace, cudaStream_t stream) {
  constexpr DecodeConfig config = Row::config;
  const PagedKvCache& c = problem.cache;
  const int group = problem.query_heads / c.num_kv_heads;
  const int columns = group * problem.query_tokens;
  const int column_tiles = (columns + config.query_columns - 1) / config.query_columns;
  const layout::PageRecord record(c.format);
  // A 16-bit tile weighs one packed chunk, or two of its halves.
  const int zone_log2 = 2 * zone_tile_bytes(config.page.head_dim) > 3 * record.chunk(1) ? 1 : 0;
  const DecodeArguments arguments{problem,
                                  record,
                                  {c.num_kv_heads * column_tiles, zone_log2},
                                  group,
                                  columns,
                                  column_tiles,
                                  plan.warps,
                                  plan.stages,
                                  plan.stage_bytes,
                                  record.page_bytes(),
                                  workspace,
                                  reinterpret_cast<int*>(workspace + plan.counters_offset)};
  decode_attention<Row><<<plan.ctas, plan.warps * 32, plan.smem_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace bitdecoding::decode
