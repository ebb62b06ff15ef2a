// SPDX-License-Identifier: Apache-2.0
// CPU append: however tokens arrive, the same pages, first rows and tail; arrival in fp16; padding.
#include "bitdecoding/quantize/append_problem.hpp"

#include <doctest.h>

#include <random>
#include <vector>

#include "bitdecoding/run.hpp"
#include "cpu/cache_box.hpp"
#include "cpu/reference_pack.hpp"
#include "legal_formats.hpp"

namespace bitdecoding {
namespace {

using namespace test;

constexpr int kHeads = 2;

// Tokens [from, from + count) of `k` and `v`, to every sequence.
void append(CacheBox& box, const TokenArray& k, const TokenArray& v, int from, int count,
            int threads = 0) {
  const std::vector<std::int32_t> begins(static_cast<std::size_t>(box.cache.batch), from);
  const std::vector<std::int32_t> counts(static_cast<std::size_t>(box.cache.batch), count);
  const AppendProblem problem{box.view(),
                              k.rows(),
                              v.rows(),
                              {box.cache.batch, from + count, begins.data(), counts.data()}};
  const Status status = append_tokens(problem, CpuExecution{threads});
  REQUIRE_MESSAGE(status.is_ok(), status.text());
}

struct Inputs {
  Inputs(const KvFormat& f, int batch, int tokens, unsigned seed)
      : k(ElementType::f32, batch, tokens, kHeads, f.head_dim, false),
        v(ElementType::f32, batch, tokens, kHeads, f.head_dim, true) {
    fill_random(k, batch, tokens, kHeads, f.head_dim, seed);
    fill_random(v, batch, tokens, kHeads, f.head_dim, seed + 1);
  }
  TokenArray k, v;
};

TEST_CASE("one by one, in pieces, at once: the same cache") {
  struct Zones {
    int first, last;
  };
  unsigned seed = 0;
  for (const KvFormat& format : all_formats()) {
    ++seed;
    const bool is_rotated = format.k_rotation != 0 || format.v_rotation != 0;
    if (seed % 4 != 0 && !is_rotated) continue;
    const Zones all_zones[] = {{0, 0}, {16, 64}, {format.page_tokens, 7}, {3, 130}};
    const Zones zones = all_zones[seed / 4 % 4];
    const int tokens = 2 * format.page_tokens + 150;
    const CacheShape shape{2, kHeads, tokens, zones.first, zones.last, 1, seed % 8 < 4};
    CacheBox at_once(format, shape, seed), single(format, shape, seed), pieces(format, shape, seed);
    const Inputs inputs(format, 2, tokens, seed);
    append(at_once, inputs.k, inputs.v, 0, tokens);
    for (int n = 0; n < tokens; ++n) append(single, inputs.k, inputs.v, n, 1);
    std::mt19937 random(seed);
    for (int n = 0; n < tokens;) {
      const int count = std::min(tokens - n, static_cast<int>(random() % 200));
      append(pieces, inputs.k, inputs.v, n, count);
      n += count;
    }
    for (CacheBox* box : {&at_once, &single, &pieces}) box->poison_unused();
    REQUIRE_MESSAGE(at_once == single, name(format));
    REQUIRE_MESSAGE(at_once == pieces, name(format));
    REQUIRE(at_once.packed[0] == (tokens - zones.last) / format.page_tokens * format.page_tokens);
    REQUIRE(check_state(at_once.view()).is_ok());
  }
}

void check_pages_and_rows(const KvFormat& format, bool has_mean) {
  CacheBox box(format, {1, kHeads, 512, 10, 20, 1, has_mean});
  const Inputs inputs(format, 1, 215, 3);
  append(box, inputs.k, inputs.v, 0, 100);
  append(box, inputs.k, inputs.v, 100, 115);
  const PagedKvCache c = box.view();
  REQUIRE(box.lengths[0] == 215);
  REQUIRE(box.packed[0] == 192);
  for (int head = 0; head < kHeads; ++head) {
    const std::vector<float> mean = box.mean_of(head);
    const float* k_mean = mean.empty() ? nullptr : mean.data();
    for (int page = 0; page < 3; ++page) {
      std::vector<float> k, v;
      for (int n = 0; n < 64 * 128; ++n) {
        k.push_back(inputs.k.get(0, page * 64 + n / 128, head, n % 128));
        v.push_back(inputs.v.get(0, page * 64 + n / 128, head, n % 128));
      }
      const ReferencePage expected(format, page == 0 ? 10 : 0, k, v, k_mean);
      const std::uint8_t* bytes = c.pool + c.page_offset(c.block_table[page], head);
      REQUIRE(std::equal(expected.bytes.begin(), expected.bytes.end(), bytes));
    }
    for (int n = 0; n < 215; ++n) {
      if (n >= 10 && n < 192) continue;
      const int row = n < 10 ? n : 10 + n % c.tail_tokens;
      float k[128], v[128];
      for (int i = 0; i < 128; ++i) {
        k[i] = inputs.k.get(0, n, head, i);
        v[i] = inputs.v.get(0, n, head, i);
      }
      arrive(k, 128, k_mean, format.k_rotation);
      arrive(v, 128, nullptr, format.v_rotation);
      for (int i = 0; i < 128; ++i) {
        const auto side = [&](int tensor) {
          return c.side[c.side_offset(c.slots[0], head, tensor) + row * 128 + i];
        };
        REQUIRE(side(0) == fp16_bits(k[i]));
        REQUIRE(side(1) == fp16_bits(v[i]));
      }
    }
  }
}

TEST_CASE("pages and rows hold what the specification says") {
  KvFormat format{.v_bits = 2, .k_group = 64, .v_group = 64, .page_tokens = 64};
  check_pages_and_rows(format, false);
  check_pages_and_rows(format, true);
  format.k_rotation = 128;
  format.v_rotation = 16;
  check_pages_and_rows(format, true);
}

TEST_CASE("elements arrive as fp16, whatever they were") {
  const float values[] = {1e6f, -INFINITY, NAN, 65519.f, 65504.f, 1.0004883f, 1e-7f, -0.f};
  for (const ElementType type : {ElementType::f16, ElementType::bf16, ElementType::f32}) {
    CacheBox box({}, {1, kHeads, 256});
    TokenArray k(type, 1, 1, kHeads, 128, false);
    for (int i = 0; i < 128 * kHeads; ++i) k.set(0, 0, i / 128, i % 128, values[i % 8]);
    append(box, k, k, 0, 1);
    const PagedKvCache c = box.view();
    for (int i = 0; i < 128; ++i) {
      const std::uint16_t expected = fp16_bits(rn16(k.get(0, 0, 0, i)));
      REQUIRE(c.side[c.side_offset(c.slots[0], 0, 0) + i] == expected);             // first row
      REQUIRE(c.side[c.side_offset(c.slots[0], 0, 1) + 16 * 128 + i] == expected);  // tail
    }
  }
}

TEST_CASE("padding is never read, ragged rows are independent") {
  const KvFormat format{.k_bits = 2, .v_bits = 2, .v_group = 64, .head_dim = 64};
  const std::int32_t leftpad[] = {0, 30, 299, 300}, count[] = {300, 251, 1, 0};
  const CacheShape shape{4, kHeads, 512, 16, 32};
  CacheBox padded(format, shape), alone(format, shape);
  TokenArray k(ElementType::bf16, 4, 300, kHeads, 64, false), v = k;  // NaN everywhere
  for (int b = 0; b < 4; ++b) {
    TokenArray own(ElementType::bf16, 4, 300, kHeads, 64, true);
    fill_random(own, 4, 300, kHeads, 64, 5);
    for (int n = 0; n < count[b]; ++n) {
      for (int i = 0; i < 64 * kHeads; ++i) {
        k.set(b, leftpad[b] + n, i / 64, i % 64, own.get(b, n, i / 64, i % 64));
        v.set(b, leftpad[b] + n, i / 64, i % 64, own.get(b, n, i / 64, i % 64));
      }
    }
    std::int32_t zeros[4] = {}, counts[4] = {};
    counts[b] = count[b];
    const AppendProblem problem{alone.view(), own.rows(), own.rows(), {4, 300, zeros, counts}};
    REQUIRE(append_tokens(problem, CpuExecution{}).is_ok());
  }
  const AppendProblem problem{padded.view(), k.rows(), v.rows(), {4, 300, leftpad, count}};
  REQUIRE(append_tokens(problem, CpuExecution{}).is_ok());
  CHECK(padded == alone);
  // Without num_tokens a row is real up to its end.
  CacheBox open(format, shape);
  const AppendProblem all{open.view(), k.rows(), v.rows(), {4, 300, leftpad, nullptr}};
  REQUIRE(append_tokens(all, CpuExecution{}).is_ok());
  CHECK(open.lengths == std::vector<std::int32_t>{300, 270, 1, 0});
}

TEST_CASE("a rollback within max_append, then other tokens") {
  const KvFormat format{.k_group = 64, .page_tokens = 64};
  const CacheShape shape{1, kHeads, 512, 0, 0, 8};
  CacheBox rolled(format, shape), straight(format, shape);
  const Inputs inputs(format, 1, 200, 1), drafts(format, 1, 200, 2);
  append(rolled, inputs.k, inputs.v, 0, 120);
  append(rolled, drafts.k, drafts.v, 120, 7);
  rolled.lengths[0] -= 7;
  append(rolled, inputs.k, inputs.v, 120, 80);
  append(straight, inputs.k, inputs.v, 0, 200);
  rolled.poison_unused();
  straight.poison_unused();
  CHECK(rolled == straight);
}

TEST_CASE("thread counts give the same cache") {
  const KvFormat format{.token_norm = true};
  const Inputs inputs(format, 1, 2000, 1);
  std::vector<CacheBox> boxes;
  for (const int threads : {1, 2, 5}) {
    boxes.emplace_back(format, CacheShape{1, kHeads, 2000});
    append(boxes.back(), inputs.k, inputs.v, 0, 2000, threads);
  }
  CHECK(boxes[0] == boxes[1]);
  CHECK(boxes[0] == boxes[2]);
}

}  // namespace
}  // namespace bitdecoding
