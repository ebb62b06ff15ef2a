// SPDX-License-Identifier: Apache-2.0
// How the bytes of a batch are dealt out: every (sequence, KV head) is a segment of items, which
// take about the same time, and every warp owns an equal run of the batch's items.
//   segment   packed items of one or two chunks | 16-bit tiles of 16 tokens
// Pure and the same on host and device: plans need no memory, and lengths never visit the host.
#pragma once

#include <cstdint>

#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/decode/config.hpp"

namespace bitdecoding::decode {

// Of the size of a group or a page: 32, 64 or 128. (Device code has no <bit>: nvcc 13.0 folds
// std::countr_zero of a variable to 32.)
constexpr int log2_of(int size) { return 5 + (size >= 64) + (size >= 128); }

// One sequence's items. A segment of one KV head; all heads have the same.
struct SegmentItems {
  int first = 0;       // tokens read from the first rows: [0, first)
  int packed = 0;      // tokens in pages are [first, packed)
  int length = 0;      // the tail is [packed, length)
  int first_item = 0;  // of the sequence; packed items wholly below `first` are no items
  int packed_items = 0;
  int first_tiles = 0;  // 16-bit items of the first rows
  int tail_tiles = 0;   // 16-bit items of the tail

  constexpr int items() const { return packed_items + first_tiles + tail_tiles; }
};

// `item_tokens`: of a packed item, a chunk or a page.
constexpr SegmentItems segment_items(int length, int packed, int keep_first, int item_tokens) {
  SegmentItems s;
  s.length = length;
  s.packed = packed;
  s.first = keep_first < packed ? keep_first : packed;
  s.first_item = s.first >> log2_of(item_tokens);
  s.packed_items = (packed >> log2_of(item_tokens)) - s.first_item;
  s.first_tiles = (s.first + kZoneTokens - 1) / kZoneTokens;
  s.tail_tiles = (length - packed + kZoneTokens - 1) / kZoneTokens;
  return s;
}

struct ItemRange {
  int begin = 0;
  int end = 0;
};

// Items [0, total) in equal contiguous shares, the first ones an item longer where they must be.
class Shares {
 public:
  Shares() = default;
  // Unsigned divisions take fewer instructions.
  constexpr Shares(int total, int count)
      : base_(static_cast<int>(static_cast<unsigned>(total) / static_cast<unsigned>(count))),
        longer_(total - base_ * count) {}

  constexpr int begin(int share) const {
    return share * base_ + (share < longer_ ? share : longer_);
  }
  constexpr ItemRange range(int share) const { return {begin(share), begin(share + 1)}; }
  // The share that holds an item. One division serves both kinds of shares.
  constexpr int at(int item) const {
    const int in_longer = longer_ * (base_ + 1);
    const bool is_longer = item < in_longer;
    const auto offset = static_cast<unsigned>(is_longer ? item : item - in_longer);
    const auto size = static_cast<unsigned>(is_longer ? base_ + 1 : base_);
    return (is_longer ? 0 : longer_) + static_cast<int>(offset / size);
  }

 private:
  int base_;
  int longer_;
};

// CTAs that get a share: none fewer than four items. What a short call saves in merges between CTAs
// is more than what its bytes then take longer: one sequence of 1024 tokens 9.2 us instead of 12.8.
constexpr int active_ctas(int total, int ctas) {
  constexpr int kLeastItems = 4;
  const int shares = total / kLeastItems;
  return shares < ctas ? (shares < 1 ? 1 : shares) : ctas;
}

// Items [begin, end) of a segment, which starts at item `segment_begin` of the batch, in a share.
constexpr ItemRange items_in(const SegmentItems& items, int segment_begin, const ItemRange& share) {
  const auto inside = [&](int item) {
    const int of_segment = item - segment_begin, all = items.items();
    return of_segment < 0 ? 0 : (of_segment < all ? of_segment : all);
  };
  return {inside(share.begin), inside(share.end)};
}

}  // namespace bitdecoding::decode
