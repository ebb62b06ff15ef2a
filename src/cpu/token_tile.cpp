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

// Channels at that distance within the eight become their sum and difference.
template <int Distance>
BITDECODING_INLINE void add_and_subtract(Float8& x) {
  constexpr auto sign = [](int i) { return (i & Distance) != 0 ? -1.f : 1.f; };
  const Float8 signs = {sign(0), sign(1), sign(2), sign(3), sign(4), sign(5), sign(6), sign(7)};
  const Float8 others =
      __builtin_shufflevector(x, x, 0 ^ Distance, 1 ^ Distance, 2 ^ Distance, 3 ^ Distance,
                              4 ^ Distance, 5 ^ Distance, 6 ^ Distance, 7 ^ Distance);
  x = others + x * signs;  // the product is exact
}

// format::transform, eight channels at a time.
BITDECODING_INLINE void transform_row(const format::Arrival& arrival, std::uint16_t* row,
                                      int head_dim) {
  Float8 x[kMaxHeadDim / 8];
  const int eights = head_dim / 8, block = arrival.rotation;
  for (int i = 0; i < eights; ++i) {
    load_fp16(row + 8 * i, x[i]);
    if (arrival.mean != nullptr) {
      Float8 mean;
      load_fp16(arrival.mean + 8 * i, mean);
      x[i] = x[i] - mean;
    }
    if (block == 0) continue;
    add_and_subtract<1>(x[i]);
    add_and_subtract<2>(x[i]);
    add_and_subtract<4>(x[i]);
  }
  for (int distance = 1; distance < block / 8; distance *= 2) {
    for (int i = 0; i < eights; ++i) {
      if ((i & distance) != 0) continue;
      const Float8 a = x[i], b = x[i + distance];
      x[i] = a + b;
      x[i + distance] = a - b;
    }
  }
  for (int i = 0; i < eights; ++i) store_fp16(x[i] * format::rotation_scale(block), row + 8 * i);
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
  if (arrival.changes()) transform_row(arrival, fp16, count);
}

}  // namespace bitdecoding::cpu
