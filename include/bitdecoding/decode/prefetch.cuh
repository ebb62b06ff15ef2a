// SPDX-License-Identifier: Apache-2.0
// What a decode kernel asks for before it knows its work.
#pragma once

#include <cstdint>

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/decode/ring.cuh"

namespace bitdecoding::decode {

// Starts what would otherwise be waited for one after the other while the lengths are being read:
// queries and block table come to the L2 cache, and the SM learns the addresses of the arrays, one
// per warp.
__device__ inline void prefetch_inputs(const DecodeArguments& a) {
  constexpr int kLine = 128;
  const DecodeProblem& p = a.problem;
  const PagedKvCache& c = p.cache;
  if (threadIdx.x % 32 == 0) {  // an array per warp
    const int warp = threadIdx.x / 32;
    const void* array = warp == 0   ? p.q
                        : warp == 1 ? c.block_table
                        : warp == 2 ? c.side
                        : warp == 3 ? c.pool
                        : warp == 4 ? a.workspace
                        : warp == 5 ? static_cast<const void*>(a.counters)
                                    : p.out;
    arch::prefetch_l2(array);
  }
  const std::int64_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const std::int64_t table_bytes = std::int64_t{4} * c.batch * c.max_pages;
  if (thread * kLine < table_bytes) {
    arch::prefetch_l2(reinterpret_cast<const char*>(c.block_table) + thread * kLine);
  }
  const std::int64_t last_row = (c.batch - 1) * p.q_batch_stride +
                                (p.query_tokens - 1) * p.q_token_stride +
                                (p.query_heads - 1) * p.q_head_stride;
  if (thread * kLine < 2 * last_row) {
    arch::prefetch_l2(static_cast<const char*>(p.q) + thread * kLine);
  }
}

}  // namespace bitdecoding::decode
