// SPDX-License-Identifier: Apache-2.0
// Eight 32-bit lanes, in the compilers' vector language: one AVX register, two of SSE or NEON.
// Arguments are references: vectors by value would tie a function to one instruction set's ABI.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/instruction_sets.hpp"

namespace bitdecoding::cpu {

using Float8 = float __attribute__((vector_size(32)));
using Int8 = std::int32_t __attribute__((vector_size(32)));
using UInt8 = std::uint32_t __attribute__((vector_size(32)));

template <class Vector, class Element>
BITDECODING_INLINE void load(const Element* from, Vector& to) {
  std::memcpy(&to, from, sizeof(to));
}

template <class Vector, class Element>
BITDECODING_INLINE void store(const Vector& from, Element* to) {
  std::memcpy(to, &from, sizeof(from));
}

using UShort8 = std::uint16_t __attribute__((vector_size(16)));

// Eight fp16 numbers; the arithmetic of format::float_from_fp16.
BITDECODING_INLINE void load_fp16(const std::uint16_t* from, Float8& to) {
  UShort8 halves;
  load(from, halves);
  const UInt8 bits = __builtin_convertvector(halves, UInt8);
  const UInt8 magnitude = bits & 0x7fffu;
  const Float8 subnormal = __builtin_convertvector((Int8)magnitude, Float8) * 0x1p-24f;
  const UInt8 rebias =
      magnitude >= 0x7c00u ? UInt8{} + ((255u - 31u) << 23) : UInt8{} + ((127u - 15u) << 23);
  const UInt8 normal = (magnitude << 13) + rebias;
  to = (Float8)((magnitude < 0x0400u ? (UInt8)subnormal : normal) | (bits & 0x8000u) << 16);
}

// Eight numbers as fp16; the arithmetic of format::fp16_from_float.
BITDECODING_INLINE void store_fp16(const Float8& from, std::uint16_t* to) {
  const UInt8 bits = (UInt8)from;
  const UInt8 sign = (bits >> 16) & 0x8000u;
  const UInt8 magnitude = bits & 0x7fffffffu;
  const UInt8 top = UInt8{} + 0x477fe000u;  // 65504
  const UInt8 finite = magnitude < top ? magnitude : top;
  const UInt8 subnormal = (UInt8)((Float8)finite + 0.5f) - 0x3f000000u;
  const UInt8 odd = (finite >> 13) & 1u;
  const UInt8 normal = (finite - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  const UInt8 rounded = (finite < 0x38800000u ? subnormal : normal) | sign;
  const UInt8 result = magnitude > 0x7f800000u ? UInt8{} + 0x7fffu : rounded;
  const UShort8 halves = __builtin_convertvector(result, UShort8);
  store(halves, to);
}

// The sum of the lanes, in a fixed order.
BITDECODING_INLINE float lane_sum(const Float8& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// columns[j][i] = rows[i][j]
BITDECODING_INLINE void transpose(const UInt8 (&rows)[8], UInt8 (&columns)[8]) {
  UInt8 pairs[8];
  UInt8 quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const UInt8& top = pairs[i + j];
      const UInt8& bottom = pairs[i + j + 2];
      quads[i + 2 * j] = __builtin_shufflevector(top, bottom, 0, 1, 8, 9, 4, 5, 12, 13);
      quads[i + 2 * j + 1] = __builtin_shufflevector(top, bottom, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int j = 0; j < 4; ++j) {
    columns[j] = __builtin_shufflevector(quads[j], quads[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    columns[j + 4] = __builtin_shufflevector(quads[j], quads[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

}  // namespace bitdecoding::cpu
