// SPDX-License-Identifier: Apache-2.0
#include "cpu/token_tile.hpp"

#include "bitdecoding/format/float16.hpp"
#include "cpu/instruction_sets.hpp"

namespace bitdecoding::cpu {
namespace {

template <class Element, class ToFloat>
BITDECODING_INLINE void convert(const TokenRows& rows, std::int64_t element, int count,
                                std::uint16_t* fp16, const ToFloat& to_float) {
  const Element* from = static_cast<const Element*>(rows.data) + element;
  for (int c = 0; c < count; ++c) fp16[c] = format::fp16_from_float(to_float(from[c]));
}

}  // namespace

BITDECODING_CLONES
void arrive(const TokenRows& rows, std::int64_t element, int count, std::uint16_t* fp16) {
  switch (rows.type) {
    case ElementType::f16:
      return convert<std::uint16_t>(rows, element, count, fp16, format::float_from_fp16);
    case ElementType::bf16:
      return convert<std::uint16_t>(rows, element, count, fp16, format::float_from_bf16);
    case ElementType::f32:
      return convert<float>(rows, element, count, fp16, [](float value) { return value; });
  }
}

}  // namespace bitdecoding::cpu
