// SPDX-License-Identifier: Apache-2.0
#include "bitdecoding/cache/paged_kv_cache.hpp"

#include <doctest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace bitdecoding {
namespace {

TEST_CASE("packed tokens: whole pages, never fewer than before, keep_last left over") {
  for (const int page_tokens : {64, 128}) {
    for (const int keep_last : {0, 1, 63, 64, 100, 256}) {
      for (int length = 0; length < 700; ++length) {
        const int packed = packed_tokens(length, keep_last, page_tokens, 0);
        REQUIRE(packed % page_tokens == 0);
        // The newest keep_last stay out, and one more page would take some of them.
        REQUIRE((packed == 0 || packed <= length - keep_last));
        REQUIRE(packed + page_tokens > length - keep_last);
        REQUIRE(packed_tokens(length, keep_last, page_tokens, 512) == std::max(packed, 512));
      }
    }
  }
}

// A sequence as an append sees it: which token each row of the ring holds.
struct Sequence {
  PagedKvCache cache;
  std::vector<int> ring = std::vector<int>(cache.keep_first + cache.tail_tokens, -1);
  int length = 0;
  int packed = 0;

  bool holds(int first, int last) const {
    for (int token = first; token < last; ++token) {
      if (ring[cache.tail_row(token)] != token) return false;
    }
    return true;
  }
  void write(int first, int last) {
    for (int token = first; token < last; ++token) ring[cache.tail_row(token)] = token;
  }
};

PagedKvCache cache_with(int page_tokens, int keep_first, int keep_last, int max_append) {
  PagedKvCache cache;
  cache.format.page_tokens = page_tokens;
  cache.keep_first = keep_first;
  cache.keep_last = keep_last;
  cache.tail_tokens = min_tail_tokens(keep_last, page_tokens, max_append);
  return cache;
}

// append_size(random) tokens at a time; `check(sequence, tokens)` before each.
template <class Size, class Append>
void append_many(Sequence s, std::mt19937& random, const Size& append_size, const Append& append) {
  for (int step = 0; step < 300; ++step) {
    append(s, append_size(random));
    REQUIRE(s.packed <= s.length);
    REQUIRE(s.holds(s.packed, s.length));
    // With the pages and the ring, nothing is missing; the newest tokens are in the ring.
    REQUIRE((s.packed == 0 || s.length - s.packed >= s.cache.keep_last));
  }
}

TEST_CASE("the smallest ring survives appends of any size that pack before they write") {
  std::mt19937 random(4);
  for (int trial = 0; trial < 100; ++trial) {
    const int page_tokens = trial % 2 ? 64 : 128, keep_last = static_cast<int>(random() % 200);
    const Sequence start{cache_with(page_tokens, trial % 17, keep_last, 1)};
    const auto size = [](std::mt19937& r) {
      return static_cast<int>(r() % 4 ? r() % 3 : r() % 1000);
    };
    append_many(start, random, size, [&](Sequence& s, int tokens) {
      const int old = s.length;
      s.length += tokens;
      const int packed = packed_tokens(s.length, keep_last, page_tokens, s.packed);
      REQUIRE(s.holds(s.packed, std::min(packed, old)));  // what the new pages need of the ring
      s.packed = packed;
      s.write(std::max(packed, old), s.length);
    });
  }
}

TEST_CASE("a ring for max_append survives appends that write before they pack") {
  std::mt19937 random(5);
  for (int trial = 0; trial < 100; ++trial) {
    const int page_tokens = trial % 2 ? 64 : 128, keep_last = static_cast<int>(random() % 200);
    const int max_append = 1 + static_cast<int>(random() % 40);
    const Sequence start{cache_with(page_tokens, trial % 17, keep_last, max_append)};
    const auto size = [&](std::mt19937& r) { return static_cast<int>(r() % (max_append + 1)); };
    append_many(start, random, size, [&](Sequence& s, int tokens) {
      s.write(s.length, s.length + tokens);
      s.length += tokens;
      REQUIRE(s.holds(s.packed, s.length));  // pages are quantised from the ring alone
      s.packed = packed_tokens(s.length, keep_last, page_tokens, s.packed);
    });
  }
}

TEST_CASE("a ring of 16 fewer rows than the smallest loses tokens") {
  for (const int keep_last : {0, 16, 64}) {
    Sequence s{cache_with(64, 0, keep_last, 1)};
    s.cache.tail_tokens -= 16;
    const int length = keep_last + 63;  // the most that may stay unpacked
    REQUIRE(packed_tokens(length, keep_last, 64, 0) == 0);
    s.write(0, length);
    CHECK_FALSE(s.holds(0, length));
  }
}

TEST_CASE("records tile the pool; first rows and ring rows tile the side buffer") {
  PagedKvCache c = cache_with(128, 16, 64, 1);
  c.num_kv_heads = 3;
  c.num_pages = 5;
  c.num_slots = 4;
  std::size_t record = 0, rows = 0;
  for (int page = 0; page < c.num_pages; ++page) {
    for (int head = 0; head < c.num_kv_heads; ++head, record += page_bytes(c.format)) {
      CHECK(c.page_offset(page, head) == record);
    }
  }
  const std::size_t row_count = c.keep_first + c.tail_tokens;
  for (int slot = 0; slot < c.num_slots; ++slot) {
    for (int head = 0; head < c.num_kv_heads; ++head) {
      for (int tensor = 0; tensor < 2; ++tensor, rows += row_count * c.format.head_dim) {
        CHECK(c.side_offset(slot, head, tensor) == rows);
      }
    }
  }
  std::vector<int> seen(row_count);
  for (int token = 0; token < c.keep_first; ++token) ++seen.at(c.first_row(token));
  for (int token = 1000; token < 1000 + c.tail_tokens; ++token) ++seen.at(c.tail_row(token));
  CHECK(seen == std::vector<int>(row_count, 1));
  // Offsets of a pool beyond 2 GB don't wrap.
  CHECK(c.page_offset(1 << 20, 2) == ((std::size_t{1} << 20) * 3 + 2) * page_bytes(c.format));
  CHECK(c.side_offset(1 << 20, 0, 0) == (std::size_t{1} << 20) * 6 * row_count * 128);
}

TEST_CASE("validate names the argument, its value and what is allowed") {
  alignas(16) static std::uint8_t pool[16];
  alignas(16) static std::uint16_t side[8];
  static std::int32_t ints[1];
  PagedKvCache good = cache_with(128, 16, 64, 1);
  good.batch = good.num_kv_heads = good.num_pages = good.num_slots = good.max_pages = 1;
  good.pool = pool;
  good.side = side;
  good.block_table = good.slots = good.lengths = good.packed = ints;
  CHECK(validate(good).is_ok());

  const auto rejects = [&good](const std::string& head, const auto& change) {
    PagedKvCache c = good;
    change(c);
    const Status status = validate(c);
    CAPTURE(status.text());
    CHECK(status.code() == StatusCode::invalid_argument);
    CHECK(status.text().starts_with(head));
  };
  rejects("k_bits = 3; allowed: ", [](PagedKvCache& c) { c.format.k_bits = 3; });
  rejects("keep_first = -1; allowed: ", [](PagedKvCache& c) { c.keep_first = -1; });
  rejects("keep_first = 129; allowed: ", [](PagedKvCache& c) { c.keep_first = 129; });
  rejects("keep_last = -1; allowed: ", [](PagedKvCache& c) { c.keep_last = -1; });
  rejects("batch = -1; allowed: ", [](PagedKvCache& c) { c.batch = -1; });
  rejects("num_kv_heads = 0; allowed: ", [](PagedKvCache& c) { c.num_kv_heads = 0; });
  rejects("num_pages, num_slots, max_pages = -1", [](PagedKvCache& c) { c.num_pages = -1; });
  rejects("tail_tokens = 176; allowed: 192", [](PagedKvCache& c) { c.tail_tokens -= 16; });
  rejects("pool address = ", [](PagedKvCache& c) { ++c.pool; });
  rejects("side address = ", [](PagedKvCache& c) { ++c.side; });
  rejects("pool = null; allowed: ", [](PagedKvCache& c) { c.pool = nullptr; });
  rejects("side = null; allowed: ", [](PagedKvCache& c) { c.side = nullptr; });
  rejects("block_table = null; allowed: ", [](PagedKvCache& c) { c.block_table = nullptr; });
  rejects("slots = null; allowed: ", [](PagedKvCache& c) { c.slots = nullptr; });
  rejects("lengths = null; allowed: ", [](PagedKvCache& c) { c.lengths = nullptr; });
  rejects("packed = null; allowed: ", [](PagedKvCache& c) { c.packed = nullptr; });
}

}  // namespace
}  // namespace bitdecoding
