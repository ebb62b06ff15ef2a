// SPDX-License-Identifier: Apache-2.0
#include "bitdecoding/format/quantizer.hpp"

#include <doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "value_families.hpp"

namespace bitdecoding::format {
namespace {

GroupParameters parameters_of(const std::vector<float>& values, int bits) {
  GroupRange range;
  for (const float value : values) range.include(value);
  return group_parameters(range, bits);
}

// visit(values, bits) for random groups of every family, size and width.
template <class Visit>
void for_each_group(const Visit& visit) {
  for (const test::Family family : test::kFamilies) {
    for (std::uint32_t seed = 0; seed < 150; ++seed) {
      test::ValueSource source(family, seed);
      for (const int size : {32, 64, 128}) {
        const std::vector<float> values = source.group(size);
        for (const int bits : {2, 4}) {
          CAPTURE(static_cast<int>(family));
          CAPTURE(seed);
          CAPTURE(size);
          CAPTURE(bits);
          visit(values, bits);
        }
      }
    }
  }
}

TEST_CASE("parameters follow their definition in exact arithmetic") {
  for_each_group([](const std::vector<float>& values, int bits) {
    const GroupParameters p = parameters_of(values, bits);
    const double low = *std::min_element(values.begin(), values.end());
    const double high = *std::max_element(values.begin(), values.end());
    REQUIRE(p.zero != 0x8000);
    REQUIRE(float_from_fp16(p.zero) == low);  // values are fp16, so rn16 changes nothing
    // One rounding to fp32 each in difference and quotient, then half an fp16 step.
    const double exact = (high - low) / max_code(bits);
    const double scale = float_from_fp16(p.scale);
    REQUIRE(std::fabs(scale - exact) <= std::max(0x1p-25, exact * 0x1p-11) + exact * 0x1p-23);
  });
}

TEST_CASE("a clip leaves the middle of a range; the ends become the first and the last code") {
  for_each_group([](const std::vector<float>& values, int bits) {
    GroupRange range;
    for (const float value : values) range.include(value);
    for (const int clip : {50, 85, 99}) {
      const GroupParameters p = group_parameters(range, bits, clip_margin(clip));
      const double width = double(range.high) - range.low, cut = width * (100 - clip) / 200.;
      const double zero = float_from_fp16(p.zero), scale = float_from_fp16(p.scale);
      const double low = range.low + cut, high = range.high - cut;
      const double fp32 = 0x1p-22 * (std::fabs(low) + std::fabs(high) + width);
      REQUIRE(std::fabs(zero - low) <= std::max(0x1p-25, std::fabs(low) * 0x1p-11) + fp32);
      const double exact = std::max(0., high - zero) / max_code(bits);
      REQUIRE(std::fabs(scale - exact) <= std::max(0x1p-25, exact * 0x1p-11) + fp32);
      if (scale < 0x1p-13 || cut < scale) continue;
      const GroupCoder coder(p);
      REQUIRE(coder.code(range.low, bits) == 0);
      REQUIRE(coder.code(range.high, bits) == static_cast<std::uint32_t>(max_code(bits)));
    }
  });
  CHECK(clip_margin(100) == 0.f);
}

TEST_CASE("a dequantised value is at most half a step off") {
  // scale / 2 from rounding the code. Where scale is an fp16 subnormal its own rounding, at most
  // 2^-25 per step, can leave values beyond the last code. The rest is fp32: difference, inverse
  // and product for the code; one sum to dequantise.
  for_each_group([](const std::vector<float>& values, int bits) {
    const GroupParameters p = parameters_of(values, bits);
    const GroupCoder coder(p);
    const double scale = float_from_fp16(p.scale), zero = float_from_fp16(p.zero);
    const int top = max_code(bits);
    const double beyond = scale < 0x1p-14 ? top * 0x1p-25 : 0.0;
    for (const float value : values) {
      const double error = std::fabs(double(dequantize(coder.code(value, bits), p)) - value);
      const double fp32 = 0x1p-22 * (value - zero) + 0x1p-24 * (std::fabs(zero) + top * scale);
      if (error > scale / 2 + beyond + fp32) FAIL(value, ": error ", error, ", scale ", scale);
    }
  });
}

// The code as the definition words it: one IEEE fp32 operation at a time.
std::uint32_t code_by_definition(float value, const GroupParameters& p, int bits) {
  const float scale = float_from_fp16(p.scale);
  if (!(scale > 0.f)) return 0;
  const volatile float inverse = 1.f / scale;
  const volatile float difference = value - float_from_fp16(p.zero);
  const volatile float scaled = difference * inverse;
  const float code = std::nearbyint(scaled);  // ties to even
  return static_cast<std::uint32_t>(std::clamp(code, 0.f, static_cast<float>(max_code(bits))));
}

TEST_CASE("codes equal the stepwise definition, and the exact one away from ties") {
  for_each_group([](const std::vector<float>& values, int bits) {
    const GroupParameters p = parameters_of(values, bits);
    const GroupCoder coder(p);
    const double scale = float_from_fp16(p.scale), zero = float_from_fp16(p.zero);
    for (const float value : values) {
      const std::uint32_t code = coder.code(value, bits);
      if (code != code_by_definition(value, p, bits)) FAIL("value ", value);
      if (scale == 0.0) continue;
      const double exact = std::min((value - zero) / scale, double(max_code(bits)));
      const double to_tie = std::fabs(exact - std::floor(exact) - 0.5);
      if (to_tie > exact * 0x1p-22 && code != std::nearbyint(exact)) FAIL("value ", value);
    }
  });
}

TEST_CASE("codes rise with values, from 0 at the smallest") {
  for_each_group([](std::vector<float> values, int bits) {
    const GroupCoder coder(parameters_of(values, bits));
    std::sort(values.begin(), values.end());
    std::uint32_t last = 0;
    REQUIRE(coder.code(values.front(), bits) == 0);
    for (const float value : values) {
      const std::uint32_t code = coder.code(value, bits);
      if (code < last) FAIL("value ", value);
      last = code;
    }
    // Rounding a scale that is no subnormal can't move the largest value off the last code.
    const float scale = float_from_fp16(parameters_of(values, bits).scale);
    if (scale >= 0x1p-14f) REQUIRE(last == static_cast<std::uint32_t>(max_code(bits)));
  });
}

TEST_CASE("coding a dequantised value gives its code back") {
  // Holds because a scale above 0 is at least 2^-16 of |zero|, far above what fp32 rounds off.
  for_each_group([](const std::vector<float>& values, int bits) {
    const GroupParameters p = parameters_of(values, bits);
    const GroupCoder coder(p);
    if (p.scale == 0) return;
    for (int code = 0; code <= max_code(bits); ++code) {
      REQUIRE(coder.code(dequantize(code, p), bits) == static_cast<std::uint32_t>(code));
    }
  });
}

TEST_CASE("parameters depend neither on the order of values nor on how ranges are merged") {
  std::mt19937 random(3);
  for_each_group([&random](std::vector<float> values, int bits) {
    const GroupParameters p = parameters_of(values, bits);
    std::shuffle(values.begin(), values.end(), random);
    REQUIRE(parameters_of(values, bits) == p);
    GroupRange first, second;
    for (std::size_t i = 0; i < values.size(); ++i) (i % 3 ? first : second).include(values[i]);
    first.include(second);
    REQUIRE(group_parameters(first, bits) == p);
  });
}

TEST_CASE("constant, empty and NaN groups; values outside the range") {
  for (const int bits : {2, 4}) {
    for (const float constant : {0.f, -0.f, 1.5f, -3.f, 65504.f, -65504.f, 0x1p-24f}) {
      const GroupParameters p = parameters_of(std::vector<float>(32, constant), bits);
      CHECK(p == GroupParameters{0, fp16_from_float(constant + 0.f)});
      CHECK(GroupCoder(p).code(constant, bits) == 0);
      CHECK(dequantize(0, p) == constant);
    }
    const GroupParameters empty = group_parameters(GroupRange{}, bits);
    CHECK(empty == GroupParameters{0, 0});
    CHECK(GroupCoder(empty).code(7.f, bits) == 0);

    const GroupParameters nan = parameters_of({1.f, std::nanf(""), 2.f}, bits);
    CHECK(nan == GroupParameters{kFp16NaN, kFp16NaN});
    for (const float value : {1.f, 2.f, std::nanf("")})
      CHECK(GroupCoder(nan).code(value, bits) == 0);
    CHECK(std::isnan(dequantize(0, nan)));

    const GroupCoder coder(parameters_of({-1.f, 2.f}, bits));  // first tokens are only clamped
    CHECK(coder.code(-5.f, bits) == 0);
    CHECK(coder.code(65504.f, bits) == static_cast<std::uint32_t>(max_code(bits)));
    CHECK(coder.code(std::nanf(""), bits) == 0);
  }
}

GroupRange range_of(const std::vector<float>& values) {
  GroupRange range;
  for (const float value : values) range.include(value);
  return range;
}

TEST_CASE("a block's exponent is the smallest whose limit holds its largest magnitude") {
  for_each_group([](const std::vector<float>& values, int bits) {
    double largest = 0.;
    for (const float value : values) largest = std::max(largest, std::fabs(double{value}));
    const std::uint8_t exponent = block_exponent(range_of(values), bits);
    const GroupParameters p = block_parameters(exponent, bits);
    const double limit = bits == 2 ? 3.5 : 10., middle = bits == 2 ? 1.5 : 7.5;
    if (largest == 0.) {
      REQUIRE(exponent == kZeroBlock);
      REQUIRE(p == GroupParameters{0, 0});
      return;
    }
    const double scale = std::ldexp(1., exponent - 15);
    REQUIRE((exponent >= 1 && exponent <= 30));
    REQUIRE(largest <= limit * scale);
    REQUIRE((exponent == 1 || largest > limit * scale / 2.));
    REQUIRE(float_from_fp16(p.scale) == scale);
    REQUIRE(float_from_fp16(p.zero) == -middle * scale);
  });
}

TEST_CASE("a value of a block gets the code whose value is nearest, exact in fp16") {
  for_each_group([](const std::vector<float>& values, int bits) {
    const GroupParameters p = block_parameters(block_exponent(range_of(values), bits), bits);
    const GroupCoder coder(p);
    const float scale = float_from_fp16(p.scale);
    for (const float value : values) {
      const std::uint32_t code = coder.code(value, bits);
      const float read = dequantize(code, p);
      REQUIRE(float_from_fp16(fp16_from_float(read)) == read);
      float nearest = INFINITY;
      for (int other = 0; other <= max_code(bits); ++other) {
        nearest = std::min(nearest, std::fabs(value - dequantize(other, p)));
      }
      // One fp32 rounding of value - zero.
      if (std::fabs(value - read) > nearest + scale * 0x1p-19f) FAIL(value, ": ", read);
    }
  });
}

TEST_CASE("blocks with a NaN, of zeros, of infinities") {
  for (const int bits : {2, 4}) {
    const std::uint8_t nan = block_exponent(range_of({1.f, std::nanf(""), 2.f}), bits);
    CHECK(nan == kNaNBlock);
    CHECK(block_parameters(nan, bits) == GroupParameters{kFp16NaN, kFp16NaN});
    CHECK(GroupCoder(block_parameters(nan, bits)).code(1.f, bits) == 0);
    CHECK(block_exponent(range_of({0.f, -0.f}), bits) == kZeroBlock);
    CHECK(block_exponent(range_of({0x1p-24f}), bits) == 1);
    CHECK(block_exponent(range_of({-65504.f, 1.f}), bits) == (bits == 2 ? 30 : 28));
    CHECK(block_exponent(range_of({block_limit(bits)}), bits) == 15);
    CHECK(block_exponent(range_of({-1.001f * block_limit(bits)}), bits) == 16);
  }
}

TEST_CASE("fusing a product into a sum changes nothing: codes times scales and squares are exact") {
  for (std::uint32_t i = 0; i < 0x7c00; ++i) {
    const float x = float_from_fp16(static_cast<std::uint16_t>(i));
    if (double(x * x) != double(x) * x) FAIL("bits ", i);
    for (int code = 0; code <= max_code(4); ++code) {
      if (double(x * code) != double(x) * code) FAIL("bits ", i);
    }
  }
}

TEST_CASE("a token's norm: its value, and the order of a warp's butterfly") {
  for (const test::Family family : test::kFamilies) {
    for (std::uint32_t seed = 0; seed < 100; ++seed) {
      for (const int head_dim : {64, 128, 256}) {
        test::ValueSource source(family, seed);
        const std::vector<float> k = source.group(head_dim);
        const std::uint16_t norm = token_norm([&](int c) { return k[c]; }, head_dim);

        double squares = 0.0;
        for (const float value : k) squares += double(value) * value;
        const double exact = std::min(std::sqrt(squares), 65504.0);
        const double error = std::fabs(float_from_fp16(norm) - exact);
        // Half an fp16 step, and what 256 additions in fp32 lose at most.
        CHECK(error <= std::max(0x1p-25, exact * 0x1p-11) + exact * 0x1p-17);

        float sums[kNormSums] = {};
        for (int c = 0; c < head_dim; ++c) sums[c % kNormSums] += k[c] * k[c];
        float lanes[kNormSums];
        std::copy_n(sums, kNormSums, lanes);
        for (int mask = kNormSums / 2; mask > 0; mask /= 2) {
          float other[kNormSums];
          for (int lane = 0; lane < kNormSums; ++lane) other[lane] = lanes[lane ^ mask];
          for (int lane = 0; lane < kNormSums; ++lane) lanes[lane] += other[lane];
        }
        CHECK(token_norm_from_sums(sums) == norm);
        for (const float lane : lanes) CHECK(lane == sums[0]);  // the whole sum, in fp32
      }
    }
  }
}

TEST_CASE("normalised keys stay in [-1, 1], and times the norm give the key back within fp16") {
  for (const test::Family family : test::kFamilies) {
    for (std::uint32_t seed = 0; seed < 100; ++seed) {
      test::ValueSource source(family, seed);
      const std::vector<float> k = source.group(64);
      const std::uint16_t norm = token_norm([&](int c) { return k[c]; }, 64);
      const double length = float_from_fp16(norm);
      for (const float value : k) {
        const double unit = float_from_fp16(normalized_key(fp16_from_float(value), norm));
        const double exact = length == 0.0 ? 0.0 : value / length;
        if (std::fabs(unit) > 1.0) FAIL("value ", value);
        const double step = std::max(0x1p-25, std::fabs(exact) * 0x1p-11);
        if (std::fabs(unit - exact) > step + std::fabs(exact) * 0x1p-22) FAIL("value ", value);
      }
    }
  }
  CHECK(normalized_key(0x3c00, kFp16NaN) == kFp16NaN);
  CHECK(normalized_key(0x8000, 0x3c00) == 0x8000);
  CHECK(normalized_key(0x0000, 0x0000) == 0x0000);
}

}  // namespace
}  // namespace bitdecoding::format
