// SPDX-License-Identifier: Apache-2.0
// Element types of queries, keys, values and outputs. Inside the cache everything is fp16 or codes.
#pragma once

#include <cstdint>

namespace bitdecoding {

enum class ElementType : std::uint8_t { f16, bf16, f32 };

constexpr int element_bytes(ElementType type) { return type == ElementType::f32 ? 4 : 2; }

constexpr const char* element_name(ElementType type) {
  switch (type) {
    case ElementType::f16: return "float16";
    case ElementType::bf16: return "bfloat16";
    case ElementType::f32: return "float32";
  }
  return "unknown";
}

}  // namespace bitdecoding
