// SPDX-License-Identifier: Apache-2.0
// Keys or values on their way into the cache: a strided view (B, S, H, D) with unit channel stride,
// and the run of real tokens in each of its rows (the rest is padding and is never read).
#pragma once

#include <cstddef>
#include <cstdint>

#include "bitdecoding/element_type.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

// One of K, V: (B, S, H, D). Strides are in elements.
struct TokenRows {
  const void* data = nullptr;
  ElementType type = ElementType::f16;
  std::int64_t batch_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;

  constexpr std::int64_t offset(int batch, int token, int head) const {
    return batch * batch_stride + token * token_stride + head * head_stride;
  }
};

// Row b holds tokens [leftpad[b], leftpad[b] + num_tokens[b]).
struct TokenRuns {
  int batch = 0;                             // B
  int row_tokens = 0;                        // S
  const std::int32_t* leftpad = nullptr;     // [B]; nullptr: 0
  const std::int32_t* num_tokens = nullptr;  // [B]; nullptr: S - leftpad

  constexpr int begin(int b) const { return leftpad == nullptr ? 0 : leftpad[b]; }
  constexpr int count(int b) const {
    return num_tokens == nullptr ? row_tokens - begin(b) : num_tokens[b];
  }
};

// Everything the host can check of the new tokens without reading the arrays.
inline Status validate(const TokenRuns& runs, const TokenRows& k, const TokenRows& v) {
  if (runs.batch < 0) return invalid_argument("batch = ", runs.batch, "; allowed: 0 or more");
  if (runs.row_tokens < 0) {
    return invalid_argument("row_tokens = ", runs.row_tokens, "; allowed: 0 or more");
  }
  if (runs.batch == 0 || runs.row_tokens == 0) return {};
  if (k.data == nullptr) return invalid_argument("k = null; allowed: an array (B, S, H, D)");
  if (v.data == nullptr) return invalid_argument("v = null; allowed: an array (B, S, H, D)");
  return {};
}

}  // namespace bitdecoding
