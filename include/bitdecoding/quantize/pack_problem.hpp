// SPDX-License-Identifier: Apache-2.0
// Prefill pack: the whole pages of new tokens, quantised straight into the pool.
// Row b's tokens are positions [P * first_page[b], ...) of its sequence; floor(count / P) pages are
// written to pages block_table[b, first_page[b] + i]. Remaining tokens are not touched.
#pragma once

#include <cstdint>

#include "bitdecoding/format/rotation.hpp"
#include "bitdecoding/quantize/token_rows.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

struct PackProblem {
  KvFormat format;
  int keep_first = 0;    // F: positions below it don't widen the ranges of channel-axis K groups
  int num_kv_heads = 0;  // H
  TokenRows k;           // (B, S, H, D)
  TokenRows v;           // (B, S, H, D)
  TokenRuns runs;

  std::uint8_t* pool = nullptr;  // [num_pages, H, page_bytes], 16-byte aligned
  int num_pages = 0;
  const std::int32_t* block_table = nullptr;  // [B, max_pages]
  int max_pages = 0;
  const std::int32_t* first_page = nullptr;  // [B]; nullptr: 0
  const std::uint16_t* k_mean = nullptr;     // fp16 [H, D], 16-byte aligned; see PagedKvCache
};

// Everything the host can check without reading the arrays.
inline Status validate(const PackProblem& p) {
  if (Status status = validate(p.format); !status.is_ok()) return status;
  if (Status status = validate(p.runs, p.k, p.v); !status.is_ok()) return status;
  if (p.keep_first < 0 || p.keep_first > p.format.page_tokens) {
    return invalid_argument("keep_first = ", p.keep_first, "; allowed: 0 to page_tokens (",
                            p.format.page_tokens, ")");
  }
  if (p.num_kv_heads < 1) {
    return invalid_argument("num_kv_heads = ", p.num_kv_heads, "; allowed: 1 or more");
  }
  if (p.num_pages < 0) {
    return invalid_argument("num_pages = ", p.num_pages, "; allowed: 0 or more");
  }
  if (p.max_pages < 0) {
    return invalid_argument("max_pages = ", p.max_pages, "; allowed: 0 or more");
  }
  if (const auto address = reinterpret_cast<std::uintptr_t>(p.pool); address % 16 != 0) {
    return invalid_argument("pool address = ", address, "; allowed: multiples of 16");
  }
  if (const auto address = reinterpret_cast<std::uintptr_t>(p.k_mean); address % 16 != 0) {
    return invalid_argument("k_mean address = ", address, "; allowed: multiples of 16");
  }
  if (p.runs.batch == 0) return {};
  if (p.pool == nullptr && p.num_pages > 0) {
    return invalid_argument("pool = null; allowed: an array [num_pages, num_kv_heads, page_bytes]");
  }
  if (p.block_table == nullptr && p.max_pages > 0) {
    return invalid_argument("block_table = null; allowed: an array [B, max_pages]");
  }
  return {};
}

// validate(), and what a launch on a CUDA device asks besides.
inline Status validate_for_cuda(const PackProblem& p) {
  if (Status status = validate(p); !status.is_ok()) return status;
  return validate_for_cuda(p.runs, p.k, p.v);
}

}  // namespace bitdecoding
