// SPDX-License-Identifier: Apache-2.0
// Keys or values on their way into the cache: a strided view (B, S, H, D) with unit channel stride,
// and the run of real tokens in each of its rows (the rest is padding and is never read).
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "bitdecoding/cache/device_error.hpp"
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
    // In 64 bits: before the run is checked, leftpad may be any int.
    return num_tokens == nullptr ? static_cast<int>(std::int64_t{row_tokens} - begin(b))
                                 : num_tokens[b];
  }
};

// A run must lie within its row; `begin` and `count` as read from memory.
constexpr Fault find_fault(const TokenRuns& runs, int begin, int count) {
  if (begin < 0 || begin > runs.row_tokens) return {DeviceError::run, begin, runs.row_tokens};
  if (count < 0 || count > runs.row_tokens - begin) {
    return {DeviceError::run, count, runs.row_tokens};
  }
  return {};
}

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

// What CUDA kernels ask of K or V besides: 16-bit rows that begin at 16-byte addresses.
inline Status validate_for_cuda(const char* argument, const TokenRows& rows) {
  if (rows.type == ElementType::f32) {
    return invalid_argument(argument, " dtype = ", element_name(rows.type),
                            "; allowed on a CUDA device: float16, bfloat16");
  }
  if (const auto address = reinterpret_cast<std::uintptr_t>(rows.data); address % 16 != 0) {
    return invalid_argument(argument, " address = ", address,
                            "; allowed on a CUDA device: multiples of 16");
  }
  for (const std::int64_t stride : {rows.batch_stride, rows.token_stride, rows.head_stride}) {
    if (stride % 8 != 0) {
      return invalid_argument(argument, " stride = ", stride,
                              " elements; allowed on a CUDA device: multiples of 8");
    }
  }
  return {};
}

inline constexpr int kMaxCudaBatch = 65535;  // a grid's y dimension

// What their launch asks besides.
inline Status validate_for_cuda(const TokenRuns& runs, const TokenRows& k, const TokenRows& v) {
  if (runs.batch > kMaxCudaBatch) {
    return invalid_argument("batch = ", runs.batch, "; allowed on a CUDA device: 0 to ",
                            kMaxCudaBatch);
  }
  if (Status status = validate_for_cuda("k", k); !status.is_ok()) return status;
  return validate_for_cuda("v", v);
}

}  // namespace bitdecoding
