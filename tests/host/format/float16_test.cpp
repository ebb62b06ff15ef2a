// SPDX-License-Identifier: Apache-2.0
#include "bitdecoding/format/float16.hpp"

#include <doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

namespace bitdecoding::format {
namespace {

// The value of fp16 bits by definition.
double fp16_value(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? std::nan("") : sign * HUGE_VAL;
  const int implicit = exponent == 0 ? 0 : 1024;
  return sign * std::ldexp(implicit + mantissa, std::max(exponent, 1) - 25);
}

// Round to nearest even on fp16's grid, then saturate; all in double.
double rounded_to_fp16(double value) {
  const double magnitude = std::fabs(value);
  if (magnitude > 65504.0) return std::copysign(65504.0, value);
  const int exponent = magnitude == 0.0 ? -24 : std::max(std::ilogb(magnitude) - 10, -24);
  return std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
}

bool converts_as_defined(float value) {
  const std::uint16_t bits = fp16_from_float(value);
  const double expected = rounded_to_fp16(value);
  return fp16_value(bits) == expected && std::signbit(value) == ((bits & 0x8000) != 0);
}

TEST_CASE("all fp16 patterns: the value is right and finite ones come back bit for bit") {
  for (std::uint32_t i = 0; i < 0x10000; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float value = float_from_fp16(bits);
    const double expected = fp16_value(bits);
    if (std::isnan(expected)) {
      if (!std::isnan(value) || fp16_from_float(value) != kFp16NaN) FAIL("bits ", i);
    } else if (std::isinf(expected)) {
      const int saturated = (bits & 0x8000) | 0x7bff;
      if (value != expected || fp16_from_float(value) != saturated) FAIL("bits ", i);
    } else if (value != expected || fp16_from_float(value) != bits) {
      FAIL("bits ", i);
    }
  }
}

TEST_CASE("every rounding boundary, a float below, on and above it") {
  // Conversion is monotone, so these 5 points per fp16 interval stand for all floats in it.
  for (std::uint32_t i = 0; i < 0x7bff; ++i) {
    const float low = float_from_fp16(static_cast<std::uint16_t>(i));
    const float high = float_from_fp16(static_cast<std::uint16_t>(i + 1));
    const float middle = (low + high) / 2;
    for (const float value : {std::nextafter(low, high), std::nextafter(middle, low), middle,
                              std::nextafter(middle, high), std::nextafter(high, low)}) {
      if (!converts_as_defined(value) || !converts_as_defined(-value)) FAIL("value ", value);
    }
  }
}

TEST_CASE("random floats of every magnitude") {
  std::mt19937 random(1);
  for (int i = 0; i < 2'000'000; ++i) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isnan(value)) {
      if (fp16_from_float(value) != kFp16NaN) FAIL("a NaN changed");
    } else if (!converts_as_defined(value)) {
      FAIL("value ", value);
    }
  }
}

TEST_CASE("saturation, signed zeros, fp32 subnormals, NaN") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const float value : {65504.f, 65519.f, 65520.f, 65536.f, 1e30f, infinity}) {
    CHECK(fp16_from_float(value) == 0x7bff);
    CHECK(fp16_from_float(-value) == 0xfbff);
  }
  CHECK(fp16_from_float(0.f) == 0);
  CHECK(fp16_from_float(-0.f) == 0x8000);
  CHECK(fp16_from_float(std::numeric_limits<float>::denorm_min()) == 0);
  CHECK(fp16_from_float(0x1p-25f) == 0);  // a tie, to even
  CHECK(fp16_from_float(std::nextafter(0x1p-25f, 1.f)) == 1);
  CHECK(fp16_from_float(std::nanf("")) == kFp16NaN);
  CHECK(fp16_from_float(-std::nanf("")) == kFp16NaN);
  static_assert(fp16_from_float(1.f) == 0x3c00 && float_from_fp16(0x3c00) == 1.f);
}

TEST_CASE("all bf16 patterns are the upper half of an fp32") {
  for (std::uint32_t i = 0; i < 0x10000; ++i) {
    const int exponent = i >> 7 & 255, mantissa = i & 127;
    const float value = float_from_bf16(static_cast<std::uint16_t>(i));
    if (exponent == 255) {
      if (mantissa ? !std::isnan(value) : !std::isinf(value)) FAIL("bits ", i);
      continue;
    }
    const double magnitude =
        std::ldexp((exponent == 0 ? 0 : 128) + mantissa, std::max(exponent, 1) - 134);
    if (value != (i & 0x8000 ? -magnitude : magnitude)) FAIL("bits ", i);
  }
}

TEST_CASE("fp32 to bf16: nearest of the two neighbours, the even one on a tie") {
  std::mt19937 random(2);
  for (int i = 0; i < 1'000'000; ++i) {
    auto bits = static_cast<std::uint32_t>(random());
    if (i % 4 == 0) bits = (bits & 0xffff0000u) | 0x8000u;  // a tie
    const auto value = std::bit_cast<float>(bits);
    if (std::isnan(value)) {
      if (!std::isnan(float_from_bf16(bf16_from_float(value)))) FAIL("bits ", bits);
      continue;
    }
    const std::uint32_t below = bits >> 16, dropped = bits & 0xffffu;  // towards zero
    const bool up = dropped > 0x8000u || (dropped == 0x8000u && below % 2 == 1);
    if (bf16_from_float(value) != below + up) FAIL("bits ", bits);
  }
}

}  // namespace
}  // namespace bitdecoding::format
