// SPDX-License-Identifier: Apache-2.0
// Random groups of fp16 values of every kind a cache meets. All went through `fp16_from_float`.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "bitdecoding/format/float16.hpp"

namespace bitdecoding::test {

enum class Family {
  normal,
  outliers,  // an offset and a spread of 100 times the rest
  constant,
  near_overflow,  // around +-6e4
  bf16_range,     // random bf16 patterns: most saturate
  infinite,       // normal with infinities
  signed_zeros,
  subnormal,  // multiples of 2^-24, few distinct ones
  any_fp16,   // random finite patterns
};
inline constexpr Family kFamilies[] = {Family::normal,        Family::outliers,   Family::constant,
                                       Family::near_overflow, Family::bf16_range, Family::infinite,
                                       Family::signed_zeros,  Family::subnormal,  Family::any_fp16};

class ValueSource {
 public:
  ValueSource(Family family, std::uint32_t seed) : family_(family), random_(seed) {
    offset_ = 10.f * normal_(random_);
  }

  // fp16 bits, never NaN.
  std::uint16_t next() {
    for (;;) {
      const std::uint16_t bits = format::fp16_from_float(raw());
      if (bits != format::kFp16NaN) return bits;
    }
  }
  std::vector<float> group(int size) {
    std::vector<float> values(size);
    for (float& value : values) value = format::float_from_fp16(next());
    return values;
  }

 private:
  float raw() {
    const float x = normal_(random_);
    const auto bits = static_cast<std::uint32_t>(random_());
    const float sign = bits & 1 ? 1.f : -1.f;
    switch (family_) {
      case Family::normal: return x;
      case Family::outliers: return 100.f * (x + offset_);
      case Family::constant: return offset_;
      case Family::near_overflow: return sign * (6e4f + 3e3f * x);
      case Family::bf16_range: return format::float_from_bf16(static_cast<std::uint16_t>(bits));
      case Family::infinite: return bits % 16 == 0 ? sign * HUGE_VALF : x;
      case Family::signed_zeros: return bits % 8 == 0 ? x * 0x1p-24f : sign * 0.f;
      case Family::subnormal: return static_cast<float>(bits % 32) * sign * 0x1p-24f;
      case Family::any_fp16: return format::float_from_fp16(static_cast<std::uint16_t>(bits));
    }
    return x;
  }

  Family family_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  float offset_;
};

}  // namespace bitdecoding::test
