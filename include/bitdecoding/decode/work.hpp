// SPDX-License-Identifier: Apache-2.0
// How the bytes of a batch are dealt out: every (sequence, KV head) is a segment of items, every
// item weighs some units, about its time, and every warp owns an equal run of the units.
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

// What the items of a launch are.
struct ItemShape {
  int packed_tokens = kChunkTokens;  // of a packed item: a chunk or a page
  int packed_log2 = 0;               // a packed item weighs 2^packed_log2 units
  int zone_log2 = 0;                 // a 16-bit tile 2^zone_log2
};

// One sequence's items. A segment of one KV head; all heads have the same.
struct SegmentItems {
  int first = 0;       // tokens read from the first rows: [0, first)
  int packed = 0;      // tokens in pages are [first, packed)
  int length = 0;      // the tail is [packed, length)
  int first_item = 0;  // of the sequence; packed items wholly below `first` are no items
  int packed_items = 0;
  int first_tiles = 0;  // 16-bit items of the first rows
  int tail_tiles = 0;   // 16-bit items of the tail
  int packed_log2 = 0, zone_log2 = 0;

  constexpr int items() const { return packed_items + first_tiles + tail_tiles; }
  constexpr int weight() const {
    return (packed_items << packed_log2) + ((first_tiles + tail_tiles) << zone_log2);
  }
  // Unit at which the last item begins.
  constexpr int last_begin() const {
    return weight() - (1 << (first_tiles + tail_tiles > 0 ? zone_log2 : packed_log2));
  }
  // The first item that begins at or after a unit of the segment.
  constexpr int item_at(int unit) const {
    const int behind = unit - (packed_items << packed_log2);
    if (behind <= 0) return (unit + (1 << packed_log2) - 1) >> packed_log2;
    return packed_items + ((behind + (1 << zone_log2) - 1) >> zone_log2);
  }
};

constexpr SegmentItems segment_items(int length, int packed, int keep_first,
                                     const ItemShape& shape) {
  SegmentItems s;
  s.length = length;
  s.packed = packed;
  s.first = keep_first < packed ? keep_first : packed;
  s.first_item = s.first >> log2_of(shape.packed_tokens);
  s.packed_items = (packed >> log2_of(shape.packed_tokens)) - s.first_item;
  s.first_tiles = (s.first + kZoneTokens - 1) / kZoneTokens;
  s.tail_tiles = (length - packed + kZoneTokens - 1) / kZoneTokens;
  s.packed_log2 = shape.packed_log2;
  s.zone_log2 = shape.zone_log2;
  return s;
}

struct UnitRange {
  int begin = 0;
  int end = 0;
};

// Units [0, total) in equal contiguous shares, the first ones a unit longer where they must be.
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
  constexpr UnitRange range(int share) const { return {begin(share), begin(share + 1)}; }
  // The share that holds a unit.
  constexpr int at(int unit) const {
    const int in_longer = longer_ * (base_ + 1);
    return unit < in_longer ? unit / (base_ + 1) : longer_ + (unit - in_longer) / base_;
  }

 private:
  int base_;
  int longer_;
};

// CTAs that get a share: at least two units each, so that an item begins in every share.
constexpr int active_ctas(int total, int ctas) {
  return total < 2 * ctas ? (total < 2 ? 1 : total / 2) : ctas;
}

// Items [begin, end) of a segment, which starts at `segment_begin`, that begin in a share.
struct ItemRange {
  int begin = 0;
  int end = 0;
};
constexpr ItemRange items_in(const SegmentItems& items, int segment_begin, const UnitRange& share) {
  const auto item_at = [&](int unit) {
    const int inside = unit - segment_begin;
    const int weight = items.weight();
    return items.item_at(inside < 0 ? 0 : (inside < weight ? inside : weight));
  };
  return {item_at(share.begin), item_at(share.end)};
}

}  // namespace bitdecoding::decode
