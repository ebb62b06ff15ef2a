// SPDX-License-Identifier: Apache-2.0
// Plan and launch of the decode kernel on the current device: header users instantiate them with a
// row of their own, the library with the rows of its table.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "bitdecoding/decode/choice.hpp"
#include "bitdecoding/decode/decode_plan.hpp"
#include "bitdecoding/decode/kernel.cuh"
#include "bitdecoding/launch.cuh"

namespace bitdecoding::decode {

// Shared memory a CTA may use: 99 KB everywhere from 8.0 to 8.9, 227 KB on 9.0.
constexpr int shared_limit_bytes(Arch arch) { return (arch == Arch::sm90 ? 227 : 99) * 1024; }

// Of any format that a kernel serves: the smallest groups, and norms.
constexpr int largest_stage_bytes(const layout::PageConfig& page) {
  const KvFormat largest{.k_bits = page.k_bits,
                         .v_bits = page.v_bits,
                         .k_axis = page.k_axis,
                         .k_group = 32,
                         .v_group = 32,
                         .head_dim = page.head_dim,
                         .token_norm = true};
  return layout::round_up(
      std::max(layout::PageRecord(largest).chunk(1), zone_tile_bytes(page.head_dim)), 128);
}

// A stage also holds a tile of 16-bit tokens, or the partial that a segment of a warp leaves.
template <DecodeConfig Config>
inline constexpr int kLeastStageBytes =
    std::max(zone_tile_bytes(Config.page.head_dim),
             Config.product() == Product::wgmma ? 0 : int{sizeof(Partial<Shape<Config>>)});

// As many streams and stages as shared memory has room for: two stages or more.
template <class Row>
void fit_rings(int packed_bytes, DecodePlan* plan) {
  constexpr DecodeConfig config = Row::config;
  constexpr int kStreamWarps = stream_warps(config);
  constexpr int kStreamBytes = stream_storage_bytes<config>();
  constexpr int kMinWarps = min_warps(config);
  static_assert(
      kMinWarps / kStreamWarps *
                  (2 * std::max(largest_stage_bytes(config.page), kLeastStageBytes<config>) +
                   kStreamBytes) +
              int{sizeof(CtaStorage)} + kMinWarps * int{sizeof(WarpStorage)} <=
          shared_limit_bytes(config.arch),
      "the fewest warps have two stages in every format");
  plan->stage_bytes = layout::round_up(std::max(packed_bytes, kLeastStageBytes<config>), 128);
  const int limit = shared_limit_bytes(config.arch);
  for (plan->warps = max_warps(config);; plan->warps -= warp_step(config)) {
    const int streams = plan->warps / kStreamWarps;
    const int fixed = static_cast<int>(sizeof(CtaStorage) + plan->warps * sizeof(WarpStorage)) +
                      streams * kStreamBytes;
    plan->stages = std::min(kMostStages, (limit - fixed) / (streams * plan->stage_bytes));
    plan->smem_bytes = streams * plan->stages * plan->stage_bytes + fixed;
    if (plan->stages >= 2 || plan->warps == kMinWarps) break;  // with these, chunks always fit
  }
}

// Packed items are pages where that costs no warp, else chunks.
template <class Row>
void fit_items(DecodePlan* plan) {
  const layout::PageRecord record(plan->format);
  fit_rings<Row>(record.chunk(1), plan);
  const int warps = plan->warps;
  plan->packed_chunks = plan->format.chunks();
  fit_rings<Row>(record.chunk(plan->packed_chunks), plan);
  if (plan->stages < 2 || plan->warps < warps) {
    plan->packed_chunks = 1;
    fit_rings<Row>(record.chunk(1), plan);
  }
}

template <class Row>
cudaError_t plan_decode(const KvFormat& format, DecodePlan* plan) {
  constexpr DecodeConfig config = Row::config;
  using S = Shape<config>;
  if (!serves(config, format)) return cudaErrorInvalidValue;
  *plan = {.format = format, .config = config};
  fit_items<Row>(plan);
  const auto kernel = decode_attention<Row>;
  // The limit is the function's, which plans of other formats share: it never shrinks.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           shared_limit_bytes(config.arch));
  if (error != cudaSuccess) return error;
  int sms = 0, per_sm = 0;
  if (error = cudaGetDevice(&plan->device); error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, plan->device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, plan->warps * 32,
                                                        plan->smem_bytes);
  if (error != cudaSuccess) return error;
  plan->ctas = std::min(sms * per_sm, kWorkspaceCounters / S::columns);
  const int streams = plan->warps / stream_warps(config);
  plan->workspace_bytes = kCounterBytes + plan->ctas * (streams + 2) * sizeof(Partial<S>);
  return cudaSuccess;
}

// What a launch of the plan tells its kernel.
inline DecodeArguments decode_arguments(const DecodeProblem& problem, const DecodePlan& plan,
                                        std::uint8_t* workspace, int* error_word) {
  const PagedKvCache& c = problem.cache;
  const int group = problem.query_heads / c.num_kv_heads;
  const int columns = group * problem.query_tokens;
  const int tile_columns = plan.config.query_columns;
  const int column_tiles = (columns + tile_columns - 1) / tile_columns;
  const layout::PageRecord record(c.format);
  return {problem,
          record,
          {packed_bytes(record, whole_page), packed_bytes(record, first_of_page),
           packed_bytes(record, second_of_page)},
          {c.num_kv_heads * column_tiles, column_tiles, plan.packed_chunks * kChunkTokens},
          group,
          columns,
          column_tiles,
          has_whole_groups(c.format),
          plan.warps,
          plan.stages,
          plan.stage_bytes,
          record.page_bytes(),
          workspace + kCounterBytes,
          reinterpret_cast<int*>(workspace),
          error_word};
}

template <class Row>
cudaError_t launch_decode(const DecodeProblem& problem, const DecodePlan& plan,
                          std::uint8_t* workspace, cudaStream_t stream, int* error_word) {
  if (problem.cache.batch == 0 || problem.query_tokens == 0) return cudaSuccess;
  return launch(decode_attention<Row>, static_cast<unsigned>(plan.ctas), plan.warps * 32,
                plan.smem_bytes, stream, decode_arguments(problem, plan, workspace, error_word));
}

}  // namespace bitdecoding::decode
