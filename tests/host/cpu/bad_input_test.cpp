// SPDX-License-Identifier: Apache-2.0
// Bad input to the CPU backend: the message names argument, index, value and what is allowed, and
// neither cache nor outputs have changed.
#include <doctest.h>

#include <climits>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "bitdecoding/run.hpp"
#include "cpu/cache_box.hpp"

namespace bitdecoding {
namespace {

using namespace test;

constexpr int kTokens = 400;

// Two sequences of 300 and 200 tokens (packed 128 each), and everything the three calls need.
struct Calls {
  Calls()
      : box({}, {2, 1, 512}),
        k(ElementType::f32, 2, kTokens, 1, 128, false),
        out(2 * 2 * 128, -7.f),
        lse(2 * 2, -7.f) {
    fill_random(k, 2, kTokens, 1, 128, 1);
    const AppendProblem first{box.view(), k.rows(), k.rows(), {2, kTokens, nullptr, counts}};
    REQUIRE(append_tokens(first, CpuExecution{}).is_ok());
    append = {box.view(), k.rows(), k.rows(), {2, kTokens, leftpad, counts}};
    counts[0] = counts[1] = 130;
    decode.cache = box.view();
    decode.query_heads = 2;
    decode.softmax_scale = 1.f;
    decode.type = ElementType::f32;
    decode.q = k.rows().data;
    decode.q_head_stride = decode.q_token_stride = 136;
    decode.q_batch_stride = k.rows().batch_stride;
    decode.out = out.data();
    decode.lse = lse.data();
    const PagedKvCache c = box.view();
    pack.format = c.format;
    pack.num_kv_heads = 1;
    pack.k = pack.v = k.rows();
    pack.runs = {2, kTokens, leftpad, counts};
    pack.pool = c.pool;
    pack.num_pages = c.num_pages;
    pack.block_table = c.block_table;
    pack.max_pages = c.max_pages;
    pack.first_page = first_page;
  }

  CacheBox box;
  TokenArray k;
  std::int32_t leftpad[2] = {}, counts[2] = {300, 200}, first_page[2] = {1, 1};
  std::vector<float> out, lse;
  PackProblem pack;
  AppendProblem append;
  DecodeProblem decode;
};

struct Case {
  const char* message;  // its beginning
  std::function<void(Calls&)> spoil;
};

// `run` on spoilt calls: the message, and nothing written.
template <class Run>
void check_refused(const std::vector<Case>& cases, const Run& run) {
  for (const Case& bad : cases) {
    Calls calls;
    bad.spoil(calls);
    const CacheBox before = calls.box;
    const Status status = run(calls);
    CHECK(status.code() == StatusCode::invalid_argument);
    CHECK_MESSAGE(status.text().starts_with(bad.message), status.text());
    CHECK(calls.box == before);
    CHECK(calls.out == std::vector<float>(calls.out.size(), -7.f));
    CHECK(calls.lse == std::vector<float>(calls.lse.size(), -7.f));
  }
}

// Device state of a cache, as decode, append and check_state see it.
std::vector<Case> bad_states() {
  return {
      {"block_table[0, 0] = 13; allowed: 0 to 12 (pages",
       [](Calls& c) { c.box.block_table[0] = 13; }},
      {"block_table[1, 0] = -1; allowed: 0 to 12", [](Calls& c) { c.box.block_table[5] = -1; }},
      {"slots[1] = 4; allowed: 0 to 3 (slots", [](Calls& c) { c.box.slots[1] = 4; }},
      {"lengths[0] = -1; allowed: 0 or more", [](Calls& c) { c.box.lengths[0] = -1; }},
      {"lengths[1] = 1000; allowed: at most 320 (packed + tail_tokens)",
       [](Calls& c) { c.box.lengths[1] = 1000; }},
      {"packed[0] = 64; allowed: multiples of page_tokens (128) from 0 to lengths[0] (300)",
       [](Calls& c) { c.box.packed[0] = 64; }},
      {"packed[1] = 256; allowed: multiples of page_tokens (128) from 0 to lengths[1] (200)",
       [](Calls& c) { c.box.packed[1] = 256; }},
      {"packed[0] = 768; allowed: at most 640 (max_pages",
       [](Calls& c) { c.box.packed[0] = 768, c.box.lengths[0] = 800; }},
  };
}

TEST_CASE("decode refuses") {
  const auto run = [](Calls& c) { return decode_attention(c.decode, CpuExecution{2}); };
  check_refused(bad_states(), run);
  check_refused(
      {
          {"query_heads = 0; allowed: multiples of", [](Calls& c) { c.decode.query_heads = 0; }},
          {"query_tokens = -1; allowed", [](Calls& c) { c.decode.query_tokens = -1; }},
          {"softmax_scale = 0; allowed", [](Calls& c) { c.decode.softmax_scale = 0.f; }},
          {"softmax_scale = nan; allowed", [](Calls& c) { c.decode.softmax_scale = NAN; }},
          {"q = null", [](Calls& c) { c.decode.q = nullptr; }},
          {"out = null", [](Calls& c) { c.decode.out = nullptr; }},
          {"k_bits = 3; allowed: 2, 4", [](Calls& c) { c.decode.cache.format.k_bits = 3; }},
          {"tail_tokens = 16; allowed: 192", [](Calls& c) { c.decode.cache.tail_tokens = 16; }},
          {"pool address = ", [](Calls& c) { c.decode.cache.pool += 8; }},
          {"lengths = null", [](Calls& c) { c.decode.cache.lengths = nullptr; }},
      },
      run);
}

TEST_CASE("check_state refuses") {
  check_refused(bad_states(), [](Calls& c) { return check_state(c.box.view()); });
}

TEST_CASE("append refuses") {
  const auto run = [](Calls& c) { return append_tokens(c.append, CpuExecution{2}); };
  check_refused(bad_states(), run);
  check_refused(
      {
          {"leftpad[1] = 401; allowed: 0 to 400", [](Calls& c) { c.leftpad[1] = 401; }},
          {"leftpad[0] = -1; allowed", [](Calls& c) { c.leftpad[0] = -1; }},
          {"num_tokens[1] = 130; allowed: 0 to 100", [](Calls& c) { c.leftpad[1] = 300; }},
          {"num_tokens[0] = -2; allowed", [](Calls& c) { c.counts[0] = -2; }},
          {"batch of k and v = 1; allowed: 2", [](Calls& c) { c.append.runs.batch = 1; }},
          {"k = null", [](Calls& c) { c.append.k.data = nullptr; }},
          {"leftpad[0] = -2147483648; allowed",
           [](Calls& c) { c.leftpad[0] = INT_MIN, c.append.runs.num_tokens = nullptr; }},
          {"lengths[1] = 330 after the append of 130 tokens; allowed: at most 329 (max_tokens)",
           [](Calls& c) { c.append.max_tokens = 329, c.counts[0] = 0; }},
          {"slots[1] = ", [](Calls& c) { c.box.slots[1] = c.box.slots[0]; }},
          // Of a sequence that doesn't grow, and a page that one attends to.
          {"slots[1] = ", [](Calls& c) { c.box.slots[1] = c.box.slots[0], c.counts[0] = 0; }},
          {"slots[1] = ", [](Calls& c) { c.box.slots[1] = c.box.slots[0], c.counts[1] = 0; }},
          {"block_table[1, 1] = ",
           [](Calls& c) { c.box.block_table[6] = c.box.block_table[0], c.counts[0] = 0; }},
          {"block_table[1, 1] = ", [](Calls& c) { c.box.block_table[6] = c.box.block_table[5]; }},
          // Of the pages that the append would write: the second page of each sequence.
          {"block_table[1, 1] = 99; allowed", [](Calls& c) { c.box.block_table[6] = 99; }},
          {"block_table[1, 1] = ", [](Calls& c) { c.box.block_table[6] = c.box.block_table[1]; }},
          {"lengths[0] = 430 after the append, which fills 2 pages; allowed: max_pages (1)",
           [](Calls& c) { c.append.cache.max_pages = 1; }},
      },
      run);
}

TEST_CASE("an append beyond 2^31 tokens is refused") {
  Calls c;
  c.append.cache.tail_tokens = std::numeric_limits<int>::max();
  c.box.lengths[0] = std::numeric_limits<int>::max() - 100;
  const Status status = append_tokens(c.append, CpuExecution{});
  CHECK_MESSAGE(status.text().starts_with("lengths[0] = 2147483677 after"), status.text());
}

TEST_CASE("pack refuses") {
  const auto run = [](Calls& c) { return pack_pages(c.pack, CpuExecution{2}); };
  check_refused(
      {
          {"first_page[0] = 5; allowed: 0 to 4", [](Calls& c) { c.first_page[0] = 5; }},
          {"first_page[1] = -1; allowed", [](Calls& c) { c.first_page[1] = -1; }},
          {"block_table[1, 1] = 13; allowed: 0 to 12", [](Calls& c) { c.box.block_table[6] = 13; }},
          {"block_table[1, 1] = ", [](Calls& c) { c.box.block_table[6] = c.box.block_table[1]; }},
          {"num_tokens[0] = 401; allowed", [](Calls& c) { c.counts[0] = 401; }},
          {"leftpad[0] = -1; allowed", [](Calls& c) { c.leftpad[0] = -1; }},
          {"keep_first = 129; allowed: 0 to", [](Calls& c) { c.pack.keep_first = 129; }},
          {"num_kv_heads = 0; allowed", [](Calls& c) { c.pack.num_kv_heads = 0; }},
          {"v_group = 256; allowed", [](Calls& c) { c.pack.format.v_group = 256; }},
          {"pool address = ", [](Calls& c) { c.pack.pool += 4; }},
          {"v = null", [](Calls& c) { c.pack.v.data = nullptr; }},
      },
      run);
}

}  // namespace
}  // namespace bitdecoding
