// SPDX-License-Identifier: Apache-2.0
#include "cpu/token_tile.hpp"

#include "cpu/instruction_sets.hpp"
#include "cpu/vector8.hpp"

namespace bitdecoding::cpu {
namespace {

BITDECODING_INLINE void load_element8(const TokenRows& rows, std::int64_t element, Float8& to) {
  if (rows.type == ElementType::f32)
    return load(static_cast<const float*>(rows.data) + element, to);
  const auto* halves = static_cast<const std::uint16_t*>(rows.data) + element;
  if (rows.type == ElementType::f16) return load_fp16(halves, to);
  UShort8 bf16;
  load(halves, bf16);
  to = (Float8)(__builtin_convertvector(bf16, UInt8) << 16);
}

}  // namespace

BITDECODING_CLONES
void arrive(const TokenRows& rows, std::int64_t element, int count, const format::Arrival& arrival,
            std::uint16_t* fp16) {
  for (int c = 0; c < count; c += 8) {
    Float8 values;
    load_element8(rows, element + c, values);
    store_fp16(values, fp16 + c);
  }
  if (arrival.changes()) format::transform(arrival, fp16, count);
}

}  // namespace bitdecoding::cpu
