// SPDX-License-Identifier: Apache-2.0
// Growth: filled pages split into those of the ring and those of new tokens alone; what stays fits
// the ring; bounds and faults.
#include "bitdecoding/quantize/growth.hpp"

#include <doctest.h>

#include <algorithm>
#include <climits>
#include <random>

namespace bitdecoding {
namespace {

PagedKvCache make_cache(int page_tokens, int keep_last, int max_append = 1) {
  PagedKvCache c;
  c.format.page_tokens = page_tokens;
  c.keep_last = keep_last;
  c.tail_tokens = min_tail_tokens(keep_last, page_tokens, max_append);
  c.num_slots = 1;
  c.max_pages = INT_MAX / page_tokens;
  return c;
}

TEST_CASE("every token of a sequence is filled into its page or stays, whatever the steps") {
  std::mt19937 random(1);
  for (int i = 0; i < 3000; ++i) {
    const int page_tokens = random() % 2 == 0 ? 64 : 128;
    const int max_append = static_cast<int>(random() % 300) + 1;
    const PagedKvCache c = make_cache(page_tokens, static_cast<int>(random() % 300), max_append);
    int length = 0, packed = 0;
    for (int step = 0; step < 8; ++step) {
      const int rows = static_cast<int>(random() % (step % 2 == 0 ? 4 : 700));
      const int count = rows - static_cast<int>(random() % static_cast<unsigned>(rows + 1)) / 4;
      const Growth g = grow(c, length, packed, count);
      REQUIRE(g.old_length == length);
      REQUIRE(g.length == length + count);
      REQUIRE(g.first_column() * page_tokens == packed);
      REQUIRE(g.end_column() * page_tokens == g.packed);
      for (int column = g.first_column(); column < g.end_column(); ++column) {
        REQUIRE((column < g.new_column()) == (column * page_tokens < length));
      }
      REQUIRE(g.first_column() <= g.new_column());
      REQUIRE(g.new_column() <= g.end_column());
      REQUIRE(g.end_column() - g.new_column() <= most_new_pages(c, rows));
      REQUIRE(g.length - g.packed < c.keep_last + page_tokens);
      REQUIRE((g.packed == packed || g.length - g.packed >= c.keep_last));
      REQUIRE(g.tail_begin() >= length);
      REQUIRE(g.tail_begin() >= g.packed);
      REQUIRE((g.tail_begin() == length || g.tail_begin() == g.packed));
      REQUIRE(find_fault(c, {g.length, g.packed, 0}) == Fault{});
      length = g.length;
      packed = g.packed;
      // A rollback: pages stay.
      const int most = std::min(max_append - 1, length - packed);
      length -= static_cast<int>(random() % static_cast<unsigned>(most + 1)) * (step % 3 == 0);
    }
  }
}

TEST_CASE("new tokens of the first rows") {
  const PagedKvCache c = make_cache(128, 64);
  CHECK(grow(c, 0, 0, 5).first_end(16) == 5);
  CHECK(grow(c, 5, 0, 100).first_end(16) == 16);
  CHECK(grow(c, 20, 0, 1).first_end(16) < 20);
  CHECK(grow(c, 0, 0, 5).first_end(0) == 0);
}

TEST_CASE("a sequence may not outgrow max_tokens, the block table or an int") {
  PagedKvCache c = make_cache(128, 64);
  CHECK(find_growth_fault(c, {100, 0, 0}, 50, 150) == Fault{});
  CHECK(find_growth_fault(c, {100, 0, 0}, 51, 150) == Fault{DeviceError::grown_length, 151, 150});
  const SequenceState longest{INT_MAX - 63, INT_MAX / 128 * 128 - 128, 0};
  CHECK(find_growth_fault(c, longest, 63, INT_MAX) == Fault{});
  CHECK(find_growth_fault(c, longest, 64, INT_MAX) ==
        Fault{DeviceError::grown_length, INT_MAX, INT_MAX});
  CHECK(find_growth_fault(c, longest, INT_MAX, INT_MAX) ==
        Fault{DeviceError::grown_length, INT_MAX, INT_MAX});
  CHECK(grow(c, longest.length, longest.packed, 63).new_column() == c.max_pages);
  c.max_pages = 3;
  CHECK(find_growth_fault(c, {100, 0, 0}, 475, INT_MAX) == Fault{});
  CHECK(find_growth_fault(c, {100, 0, 0}, 476, INT_MAX) == Fault{DeviceError::grown_pages, 4, 3});
}

TEST_CASE("no append fills more new pages than a launch has parts for") {
  const PagedKvCache c = make_cache(64, 100);
  CHECK(most_new_pages(c, 1) == 0);
  CHECK(most_new_pages(c, 163) == 0);
  CHECK(most_new_pages(c, 164) == 1);
  CHECK(most_new_pages(c, INT_MAX) == (INT_MAX - 100) / 64);
}

}  // namespace
}  // namespace bitdecoding
