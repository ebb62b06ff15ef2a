// SPDX-License-Identifier: Apache-2.0
// 16-bit floats as bit patterns, converted the same way on every host and device.
// Everything that enters a cache passes `fp16_from_float`: round to nearest even, and magnitudes
// above 65504 (inf too) become 65504, so that one bf16 outlier can't turn a row into inf or NaN.
#pragma once

#include <bit>
#include <cstdint>

namespace bitdecoding::format {

inline constexpr float kFp16Max = 65504.f;
inline constexpr std::uint16_t kFp16NaN = 0x7fff;  // the one NaN we write

constexpr float float_from_fp16(std::uint16_t bits) {
  const std::uint32_t magnitude = bits & 0x7fffu;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  // Subnormals are counted in steps of 2^-24; no fp32 subnormal arises, whatever flush mode is set.
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  const std::uint32_t rebias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const std::uint32_t normal = (magnitude << 13) + rebias;
  const std::uint32_t value =
      magnitude < 0x0400u ? std::bit_cast<std::uint32_t>(subnormal) : normal;
  return std::bit_cast<float>(value | sign);
}

constexpr float float_from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// Round to nearest even; a NaN stays one.
constexpr std::uint16_t bf16_from_float(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(value != value ? 0x7fffu : rounded);
}

constexpr std::uint16_t fp16_from_float(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  constexpr std::uint32_t kMax = std::bit_cast<std::uint32_t>(kFp16Max);
  const std::uint32_t finite = magnitude < kMax ? magnitude : kMax;
  // Below 2^-14 the addition of 0.5 rounds to steps of 2^-24 in the low mantissa bits.
  constexpr std::uint32_t kHalf = std::bit_cast<std::uint32_t>(0.5f);
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(finite) + 0.5f) - kHalf;
  const std::uint32_t odd = (finite >> 13) & 1u;
  const std::uint32_t normal = (finite - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  const std::uint32_t rounded = finite < 0x38800000u ? subnormal : normal;
  return static_cast<std::uint16_t>(magnitude > 0x7f800000u ? kFp16NaN : (rounded | sign));
}

}  // namespace bitdecoding::format
