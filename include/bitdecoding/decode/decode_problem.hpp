// SPDX-License-Identifier: Apache-2.0
// Decode attention: out = softmax(softmax_scale * Q K^T) V over the whole cache of each sequence.
//   q, out (B, Sq, Hq, D)   lse fp32 (B, Hq, Sq), natural log   Hq = num_kv_heads * head group
// Every query token attends to every token of its sequence. An empty sequence gives 0 and -inf.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/element_type.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

struct DecodeProblem {
  PagedKvCache cache;
  int query_tokens = 1;  // Sq
  int query_heads = 0;   // Hq
  float softmax_scale = 0.f;

  ElementType type = ElementType::f16;  // of q and out
  const void* q = nullptr;              // (B, Sq, Hq, D), unit channel stride; strides in elements
  std::int64_t q_batch_stride = 0;
  std::int64_t q_token_stride = 0;
  std::int64_t q_head_stride = 0;
  void* out = nullptr;   // (B, Sq, Hq, D), contiguous
  float* lse = nullptr;  // (B, Hq, Sq), contiguous; nullptr: not wanted
};

// Everything the host can check without reading the arrays.
inline Status validate(const DecodeProblem& p) {
  if (Status status = validate(p.cache); !status.is_ok()) return status;
  if (p.query_tokens < 0) {
    return invalid_argument("query_tokens = ", p.query_tokens, "; allowed: 0 or more");
  }
  if (p.query_heads < 1 || p.query_heads % p.cache.num_kv_heads != 0) {
    return invalid_argument("query_heads = ", p.query_heads,
                            "; allowed: multiples of num_kv_heads (", p.cache.num_kv_heads, ")");
  }
  // 0 is what a forgotten field holds.
  if (!std::isfinite(p.softmax_scale) || p.softmax_scale == 0.f) {
    return invalid_argument("softmax_scale = ", p.softmax_scale, "; allowed: finite, not 0");
  }
  if (p.cache.batch == 0 || p.query_tokens == 0) return {};
  if (p.q == nullptr) return invalid_argument("q = null; allowed: an array (B, Sq, Hq, D)");
  if (p.out == nullptr) return invalid_argument("out = null; allowed: an array (B, Sq, Hq, D)");
  return {};
}

// validate(), and what a launch on a CUDA device asks besides: 16-bit queries that are read in
// pairs, outputs that are written four at a time, a ring in which no tile of 16 tokens wraps
// around, and work (64-token chunks and 16-bit tiles of all heads) that an int32 can count.
inline Status validate_for_cuda(const DecodeProblem& p) {
  if (Status status = validate(p); !status.is_ok()) return status;
  if (p.type == ElementType::f32) {
    return invalid_argument("q dtype = ", element_name(p.type),
                            "; allowed on a CUDA device: float16, bfloat16");
  }
  if (const auto address = reinterpret_cast<std::uintptr_t>(p.q); address % 4 != 0) {
    return invalid_argument("q address = ", address, "; allowed on a CUDA device: multiples of 4");
  }
  for (const std::int64_t stride : {p.q_batch_stride, p.q_token_stride, p.q_head_stride}) {
    if (stride % 2 != 0) {
      return invalid_argument("q stride = ", stride,
                              " elements; allowed on a CUDA device: multiples of 2");
    }
  }
  if (const auto address = reinterpret_cast<std::uintptr_t>(p.out); address % 8 != 0) {
    return invalid_argument("out address = ", address,
                            "; allowed on a CUDA device: multiples of 8");
  }
  const PagedKvCache& c = p.cache;
  if (c.tail_tokens % 16 != 0) {
    return invalid_argument("tail_tokens = ", c.tail_tokens,
                            "; allowed on a CUDA device: multiples of 16");
  }
  // A tile of query columns of a KV head reads the cache once; the narrowest tiles have 4.
  const std::int64_t columns = std::int64_t{p.query_tokens} * (p.query_heads / c.num_kv_heads);
  const std::int64_t segments = (columns + 3) / 4 * c.num_kv_heads * c.batch;
  const std::int64_t units = std::int64_t{c.max_pages} * c.format.chunks() +
                             (std::int64_t{c.keep_first} + c.tail_tokens) / 4 + 4;
  if (columns > INT32_MAX || segments > INT32_MAX / units) {
    return invalid_argument("query_tokens * query_heads / num_kv_heads = ", columns,
                            " with batch * num_kv_heads = ", std::int64_t{c.batch} * c.num_kv_heads,
                            "; allowed on a CUDA device with such a cache: a product up to about ",
                            INT32_MAX / units * 4);
  }
  return {};
}

}  // namespace bitdecoding
