// SPDX-License-Identifier: Apache-2.0
// Cases for a pack: ragged and padded rows, shuffled pages, families of values; and their bytes.
#pragma once

#include <doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "bitdecoding/format/float16.hpp"
#include "bitdecoding/run.hpp"

namespace bitdecoding::test {

inline constexpr int kRows = 4;         // B
inline constexpr int kHeads = 2;        // H
inline constexpr int kRowTokens = 409;  // S
inline constexpr int kMaxPages = 9;
inline constexpr std::uint8_t kPoison = 0xa5;

enum class Family { normal, outlier_channels, constant, large, non_finite, tiny, last = tiny };

// 16-bit patterns of (B, S, H, D).
inline std::vector<std::uint16_t> draw(Family family, ElementType type, int head_dim,
                                       std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> one_in(0, 99);
  std::vector<std::uint16_t> values(std::size_t(kRows) * kRowTokens * kHeads * head_dim);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const int channel = int(i % head_dim);
    float x = normal(rng);
    if (family == Family::outlier_channels && channel % 13 == 3) x = 100.f * x + 40.f;
    if (family == Family::constant) x = float(channel % 5) - 2.f;
    if (family == Family::large) x = 6e4f + 3e3f * x;  // some overflow fp16
    if (family == Family::non_finite && one_in(rng) == 0) x = x > 0.f ? INFINITY : -INFINITY;
    if (family == Family::non_finite && one_in(rng) == 1) x = NAN;
    if (family == Family::tiny) x *= 1e-7f;
    std::uint16_t bits = format::fp16_from_float(x);
    if (type == ElementType::bf16) {
      if (family == Family::large && one_in(rng) < 5) x *= 1e30f;  // beyond fp16's range
      bits = std::uint16_t(std::bit_cast<std::uint32_t>(x) >> 16);
    } else if (std::isinf(x)) {
      bits = x > 0.f ? 0x7c00 : 0xfc00;
    } else if (one_in(rng) == 2) {
      bits = 0x8000;  // -0
    }
    values[i] = bits;
  }
  return values;
}

struct PackCase {
  PackProblem problem;  // without pointers
  std::vector<std::uint16_t> k, v;
  std::vector<std::uint16_t> k_mean;  // (H, D), of every third seed; empty: none
  std::vector<std::int32_t> leftpad{0, 3, 17, 0}, num_tokens{409, 0, 0, 0}, first_page{0, 1, 0, 2};
  std::vector<std::int32_t> block_table = std::vector<std::int32_t>(kRows * kMaxPages);
  std::vector<std::uint8_t> pool;

  PackCase(const KvFormat& f, Family family, ElementType type, int keep_first, unsigned seed) {
    std::mt19937 rng(seed);
    k = draw(family, type, f.head_dim, rng);
    v = draw(family, type, f.head_dim, rng);
    for (int i = 0; seed % 3 == 0 && i < kHeads * f.head_dim; ++i) {
      k_mean.push_back(format::fp16_from_float(static_cast<float>(rng() % 64) / 8.f - 4.f));
    }
    num_tokens[1] = f.page_tokens - 1;      // not one page
    num_tokens[2] = 2 * f.page_tokens + 1;  // two, and a rest that is not touched
    num_tokens[3] = 3 * f.page_tokens;
    std::iota(block_table.begin(), block_table.end(), 0);
    std::shuffle(block_table.begin(), block_table.end(), rng);
    problem.format = f;
    problem.keep_first = keep_first;
    problem.num_kv_heads = kHeads;
    problem.k = problem.v = {nullptr, type, std::int64_t(kRowTokens) * kHeads * f.head_dim,
                             std::int64_t(kHeads) * f.head_dim, f.head_dim};
    problem.num_pages = kRows * kMaxPages;
    problem.max_pages = kMaxPages;
    problem.runs = {kRows, kRowTokens, nullptr, nullptr};
    pool.assign(std::size_t(problem.num_pages) * kHeads * page_bytes(f), kPoison);
  }

  PackProblem with(const std::uint16_t* k, const std::uint16_t* v, const std::int32_t* leftpad,
                   const std::int32_t* num_tokens, const std::int32_t* first_page,
                   const std::int32_t* block_table, const std::uint16_t* k_mean,
                   std::uint8_t* pool) const {
    PackProblem p = problem;
    p.k.data = k;
    p.v.data = v;
    p.runs.leftpad = leftpad;
    p.runs.num_tokens = num_tokens;
    p.first_page = first_page;
    p.block_table = block_table;
    p.k_mean = this->k_mean.empty() ? nullptr : k_mean;
    p.pool = pool;
    return p;
  }
};

inline std::vector<std::uint8_t> pack_on_cpu(const PackCase& c) {
  std::vector<std::uint8_t> pool = c.pool;
  const Status status =
      pack_pages(c.with(c.k.data(), c.v.data(), c.leftpad.data(), c.num_tokens.data(),
                        c.first_page.data(), c.block_table.data(), c.k_mean.data(), pool.data()),
                 CpuExecution{});
  REQUIRE_MESSAGE(status.is_ok(), status.text());
  return pool;
}

}  // namespace bitdecoding::test
