// SPDX-License-Identifier: Apache-2.0
// CPU pack against a second implementation written from docs/format.md: every byte, every format.
#include <doctest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bitdecoding/run.hpp"
#include "cpu/cache_box.hpp"
#include "cpu/reference_pack.hpp"
#include "legal_formats.hpp"
#include "value_families.hpp"

namespace bitdecoding {
namespace {

using namespace test;

// One problem with its memory: two rows of ragged runs, shuffled pages.
struct PackBox {
  PackBox(const KvFormat& format, ElementType type, int keep_first, unsigned seed)
      : box(format, {2, kHeads, 4 * format.page_tokens, keep_first, 0, 1, seed % 7 == 0}, seed),
        tokens(2 * format.page_tokens + 7),
        k(type, 2, tokens, kHeads, format.head_dim, seed % 2 == 0),
        v(type, 2, tokens, kHeads, format.head_dim, seed % 2 == 1) {
    const PagedKvCache c = box.view();
    problem.format = format;
    problem.keep_first = keep_first;
    problem.num_kv_heads = kHeads;
    problem.k = k.rows();
    problem.v = v.rows();
    problem.runs = {2, tokens, leftpad, num_tokens};
    problem.pool = c.pool;
    problem.num_pages = c.num_pages;
    problem.block_table = c.block_table;
    problem.max_pages = c.max_pages;
    problem.first_page = first_page;
    problem.k_mean = c.k_mean;
    leftpad[1] = 5;
    num_tokens[0] = 2 * format.page_tokens + 1;
    num_tokens[1] = format.page_tokens;
  }

  // The record that should lie where the cache has page `i` of this call's pages of row b.
  std::vector<std::uint8_t> expected(int b, int i, int head) const {
    const int p = problem.format.page_tokens, d = problem.format.head_dim;
    std::vector<float> k_page, v_page;
    for (int n = 0; n < p; ++n) {
      for (int c = 0; c < d; ++c) {
        k_page.push_back(k.get(b, leftpad[b] + i * p + n, head, c));
        v_page.push_back(v.get(b, leftpad[b] + i * p + n, head, c));
      }
    }
    const int free_tokens = first_page[b] + i == 0 ? problem.keep_first : 0;
    const std::vector<float> mean = box.mean_of(head);
    return ReferencePage(problem.format, free_tokens, k_page, v_page,
                         mean.empty() ? nullptr : mean.data())
        .bytes;
  }

  static constexpr int kHeads = 2;
  CacheBox box;
  int tokens;
  TokenArray k, v;
  std::int32_t leftpad[2] = {}, num_tokens[2] = {}, first_page[2] = {0, 2};
  PackProblem problem;
};

void fill_with_families(PackBox& box, unsigned seed, bool with_nan) {
  const int d = box.problem.format.head_dim;
  unsigned stream = seed * 1000;
  for (TokenArray* array : {&box.k, &box.v}) {
    for (int b = 0; b < 2; ++b) {
      for (int head = 0; head < PackBox::kHeads; ++head) {
        ++stream;
        ValueSource source(kFamilies[stream % std::size(kFamilies)], stream);
        for (int n = 0; n < box.tokens; ++n) {
          for (int c = 0; c < d; ++c) {
            array->set(b, n, head, c, format::float_from_fp16(source.next()));
          }
        }
        array->set(b, 9, head, 3, 1e30f);
        if (with_nan) array->set(b, 40, head, 1, NAN);
      }
    }
  }
}

void check_pack(PackBox& box) {
  const PackProblem& p = box.problem;
  const std::size_t record = static_cast<std::size_t>(page_bytes(p.format));
  std::vector<std::uint8_t> expected(box.box.pool.size() * sizeof(Piece), 0xff);
  for (int b = 0; b < 2; ++b) {
    for (int i = 0; i < box.num_tokens[b] / p.format.page_tokens; ++i) {
      for (int head = 0; head < PackBox::kHeads; ++head) {
        const int id = p.block_table[b * p.max_pages + box.first_page[b] + i];
        const auto bytes = box.expected(b, i, head);
        REQUIRE(bytes.size() == record);
        std::copy(
            bytes.begin(), bytes.end(),
            expected.begin() + static_cast<std::ptrdiff_t>(box.box.view().page_offset(id, head)));
      }
    }
  }
  const Status status = pack_pages(p, CpuExecution{});
  REQUIRE_MESSAGE(status.is_ok(), status.text());
  const auto [want, got] = std::mismatch(expected.begin(), expected.end(), p.pool);
  REQUIRE_MESSAGE(want == expected.end(), name(p.format), ": byte ",
                  (want - expected.begin()) % static_cast<std::ptrdiff_t>(record),
                  " of a record is ", int{*got}, ", expected ", int{*want});
}

TEST_CASE("every byte of every legal format") {
  const ElementType types[] = {ElementType::f16, ElementType::bf16, ElementType::f32};
  unsigned seed = 0;
  for (const KvFormat& format : all_formats()) {
    ++seed;
    const int keep_first[] = {0, 16, 50, format.page_tokens};
    PackBox box(format, types[seed % 3], keep_first[seed % 4], seed);
    fill_with_families(box, seed, seed % 5 == 0);
    check_pack(box);
  }
}

TEST_CASE("thread counts give the same bytes") {
  for (const bool norm : {false, true}) {
    const KvFormat format{.k_group = 32, .v_group = 32, .token_norm = norm};
    std::vector<CacheBox> boxes;
    for (const int threads : {1, 2, 5}) {
      const int tokens = 16 * format.page_tokens;
      CacheBox& box = boxes.emplace_back(format, CacheShape{1, 3, tokens, 16, 0}, 4);
      TokenArray k(ElementType::f32, 1, tokens, 3, 128, false), v = k;
      fill_random(k, 1, tokens, 3, 128, 1);
      fill_random(v, 1, tokens, 3, 128, 2);
      const PagedKvCache c = box.view();
      PackProblem p;
      p.format = format;
      p.keep_first = 16;
      p.num_kv_heads = 3;
      p.k = k.rows();
      p.v = v.rows();
      p.runs = {1, tokens, nullptr, nullptr};
      p.pool = c.pool;
      p.num_pages = c.num_pages;
      p.block_table = c.block_table;
      p.max_pages = c.max_pages;
      REQUIRE(pack_pages(p, CpuExecution{threads}).is_ok());
    }
    CHECK(boxes[0] == boxes[1]);
    CHECK(boxes[0] == boxes[2]);
  }
}

}  // namespace
}  // namespace bitdecoding
