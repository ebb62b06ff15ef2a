// SPDX-License-Identifier: Apache-2.0
// Properties of the decode plan: every item of every segment begins in exactly one share, shares
// are equal to an item, and the CTAs of a segment are the shares that hold an item of it.
#include "bitdecoding/decode/work.hpp"

#include <doctest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace bitdecoding::decode {
namespace {

struct Segment {
  SegmentItems items;
  int begin;  // item of the batch
};

int draw_item_tokens(int page, std::mt19937& random) { return random() % 2 ? page : kChunkTokens; }

// Segments of a ragged batch, one after the other, and their items together.
std::vector<Segment> draw_segments(std::mt19937& random, int* total) {
  const int page = random() % 2 ? 64 : 128, keep_first = static_cast<int>(random() % 65);
  const int keep_last = static_cast<int>(random() % 200);
  const int item_tokens = draw_item_tokens(page, random);
  std::vector<Segment> segments;
  *total = 0;
  for (int b = 0, batch = 1 + static_cast<int>(random() % 40); b < batch; ++b) {
    const int longest = random() % 4 == 0 ? 2 : 5000;
    const int length = static_cast<int>(random() % static_cast<unsigned>(longest));
    const int packed = packed_tokens(length, keep_last, page, 0);
    const SegmentItems items = segment_items(length, packed, keep_first, item_tokens);
    segments.push_back({items, *total});
    *total += items.items();
  }
  return segments;
}

}  // namespace

TEST_CASE("items cover the attended tokens and nothing else") {
  std::mt19937 random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    const int page = trial % 2 ? 64 : 128, length = static_cast<int>(random() % 3000);
    const int keep_first = static_cast<int>(random() % 65),
              keep_last = static_cast<int>(random() % 150);
    const int packed = packed_tokens(length, keep_last, page, 0);
    const int tokens = draw_item_tokens(page, random);
    const SegmentItems s = segment_items(length, packed, keep_first, tokens);
    CHECK(s.first == std::min(keep_first, packed));
    CHECK((s.first_item + s.packed_items) * tokens == packed);
    CHECK(s.first_item * tokens <= s.first);
    CHECK((s.packed_items == 0 || (s.first_item + 1) * tokens > s.first));  // none wholly masked
    CHECK(s.first_tiles * kZoneTokens >= s.first);
    CHECK(s.tail_tiles * kZoneTokens >= length - packed);
    CHECK((s.items() == 0) == (length == 0));
  }
}

TEST_CASE("every item begins in one share; a segment has the shares from its first to its last") {
  std::mt19937 random(2);
  for (int trial = 0; trial < 300; ++trial) {
    int total = 0;
    const std::vector<Segment> segments = draw_segments(random, &total);
    if (total == 0) continue;
    const int ctas = active_ctas(total, 1 + static_cast<int>(random() % 140));
    const Shares shares(total, ctas);
    CHECK(shares.begin(0) == 0);
    CHECK(shares.begin(ctas) == total);
    for (const Segment& segment : segments) {
      if (segment.items.items() == 0) continue;
      const int first = shares.at(segment.begin);
      const int last = shares.at(segment.begin + segment.items.items() - 1);
      int next = 0;
      for (int cta = 0; cta < ctas; ++cta) {
        const ItemRange share = shares.range(cta);
        const ItemRange mine = items_in(segment.items, segment.begin, share);
        const bool expected = cta >= first && cta <= last;
        CHECK((mine.begin < mine.end) == expected);
        if (mine.begin == mine.end) continue;
        CHECK(mine.begin == next);
        next = mine.end;
      }
      CHECK(next == segment.items.items());
    }
  }
}

TEST_CASE("shares differ by an item at most, and an item lies in the share that says so") {
  for (const int total : {1, 2, 7, 131, 132, 133, 5000}) {
    for (const int count : {1, 2, 12, 132}) {
      const Shares shares(total, count);
      for (int share = 0; share < count; ++share) {
        const ItemRange range = shares.range(share);
        CHECK(range.end - range.begin >= total / count);
        CHECK(range.end - range.begin <= total / count + 1);
        for (int item = range.begin; item < range.end; ++item) CHECK(shares.at(item) == share);
      }
    }
  }
}

}  // namespace bitdecoding::decode
