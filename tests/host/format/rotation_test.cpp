// SPDX-License-Identifier: Apache-2.0
// The transform of rows on arrival: exact cases, its own inverse, what spoils what.
#include "bitdecoding/format/rotation.hpp"

#include <doctest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

namespace bitdecoding::format {
namespace {

constexpr int kBlocks[] = {16, 64, 128};

// Row i, column j of H, times the root of its size.
float sign(int i, int j) {
  return std::popcount(static_cast<unsigned>(i & j)) % 2 == 0 ? 1.f : -1.f;
}

std::vector<float> whole_numbers(int count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> row(static_cast<std::size_t>(count));
  for (float& x : row) x = static_cast<float>(static_cast<int>(random() % 201) - 100);
  return row;
}

TEST_CASE("rows of whole numbers: sums are exact, and the last product is one rounding") {
  for (const int block : kBlocks) {
    for (const int head_dim : {64, 128, 256}) {
      if (block > head_dim) continue;
      const std::vector<float> x = whole_numbers(head_dim, static_cast<unsigned>(block));
      std::vector<float> turned = x;
      rotate(turned.data(), head_dim, block);
      for (int c = 0; c < head_dim; ++c) {
        float sum = 0.f;
        for (int j = 0; j < block; ++j) {
          sum += sign(c % block, j) * x[static_cast<std::size_t>(c / block * block + j)];
        }
        CHECK(turned[static_cast<std::size_t>(c)] ==
              sum * static_cast<float>(1. / std::sqrt(static_cast<double>(block))));
      }
    }
  }
}

TEST_CASE("a rotation is its own inverse") {
  for (const int block : kBlocks) {
    const std::vector<float> x = whole_numbers(128, 7);
    std::vector<float> twice = x;
    rotate(twice.data(), 128, block);
    rotate(twice.data(), 128, block);
    for (std::size_t c = 0; c < x.size(); ++c) {
      if (block == 128) {
        CHECK(std::abs(twice[c] - x[c]) <= 1e-4f);  // its scale is no power of two
      } else {
        CHECK(twice[c] == x[c]);
      }
    }
  }
  std::vector<float> same = whole_numbers(64, 1);
  rotate(same.data(), 64, 0);
  CHECK(same == whole_numbers(64, 1));
}

// Rows of 128 fp16 bits, all zeros but for what is given.
struct Row {
  std::uint16_t bits[128] = {};
};
Row row_of(int channel, float value) {
  Row row;
  row.bits[channel] = fp16_from_float(value);
  return row;
}

TEST_CASE("rows of fp16: one value spreads over its block, and is rounded once") {
  Row row = row_of(17, 3.f);
  transform({16, nullptr}, row.bits, 128);
  for (int c = 0; c < 128; ++c) {
    const float expected = c / 16 == 1 ? 0.75f * sign(c % 16, 1) : 0.f;
    CHECK(float_from_fp16(row.bits[c]) == expected);
  }
  row = row_of(0, 1.f);
  transform({128, nullptr}, row.bits, 128);
  for (const std::uint16_t x : row.bits) CHECK(x == fp16_from_float(0.0883883476f));
}

TEST_CASE("the mean goes first") {
  Row mean, row;
  for (int c = 0; c < 128; ++c) {
    mean.bits[c] = fp16_from_float(static_cast<float>(c % 5) - 2.f);
    row.bits[c] = fp16_from_float(static_cast<float>(c % 5) - 2.f + (c == 64 ? 8.f : 0.f));
  }
  Row centred = row;
  transform({0, mean.bits}, centred.bits, 128);
  for (int c = 0; c < 128; ++c) CHECK(float_from_fp16(centred.bits[c]) == (c == 64 ? 8.f : 0.f));
  transform({64, mean.bits}, row.bits, 128);
  for (int c = 0; c < 128; ++c) CHECK(float_from_fp16(row.bits[c]) == (c >= 64 ? 1.f : 0.f));
}

TEST_CASE("a NaN spoils its block, large values saturate") {
  for (const int block : kBlocks) {
    Row row = row_of(70, NAN);
    transform({block, nullptr}, row.bits, 128);
    for (int c = 0; c < 128; ++c) CHECK((row.bits[c] == kFp16NaN) == (c / block == 70 / block));
  }
  Row row;
  for (std::uint16_t& x : row.bits) x = fp16_from_float(-60000.f);
  transform({64, nullptr}, row.bits, 128);
  for (int c = 0; c < 128; ++c) {
    CHECK(float_from_fp16(row.bits[c]) == (c % 64 == 0 ? -65504.f : 0.f));
  }
  constexpr Arrival kNothing;
  static_assert(!kNothing.changes());
}

}  // namespace
}  // namespace bitdecoding::format
