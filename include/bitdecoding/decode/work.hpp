// SPDX-License-Identifier: Apache-2.0
// How the bytes of a batch are dealt out: every (sequence, KV head) is a segment of items, every
// item a weight in units of about one packed chunk, and every warp owns an equal run of the units.
//   segment   packed chunks, weight 1 each | 16-bit tiles of 16 tokens, weight 2^zone_log2 each
// Pure and the same on host and device: plans need no memory, and lengths never visit the host.
#pragma once

#include <cstdint>

#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/decode/config.hpp"

namespace bitdecoding::decode {

// One sequence's items. A segment of one KV head; all heads have the same.
struct SegmentItems {
  int first = 0;        // tokens read from the first rows: [0, first)
  int packed = 0;       // tokens in pages are [first, packed)
  int length = 0;       // the tail is [packed, length)
  int first_chunk = 0;  // of the sequence; chunks wholly below `first` are no items
  int chunks = 0;       // packed items
  int first_tiles = 0;  // 16-bit items of the first rows
  int tail_tiles = 0;   // 16-bit items of the tail
  int zone_log2 = 0;    // a 16-bit item weighs 2^zone_log2 packed ones

  constexpr int items() const { return chunks + first_tiles + tail_tiles; }
  constexpr int weight() const { return chunks + ((first_tiles + tail_tiles) << zone_log2); }
  // Unit at which the last item begins.
  constexpr int last_begin() const {
    return weight() - (first_tiles + tail_tiles > 0 ? 1 << zone_log2 : 1);
  }
  // The first item that begins at or after a unit of the segment.
  constexpr int item_at(int unit) const {
    if (unit <= chunks) return unit;
    return chunks + ((unit - chunks + (1 << zone_log2) - 1) >> zone_log2);
  }
};

constexpr SegmentItems segment_items(int length, int packed, int keep_first, int zone_log2) {
  SegmentItems s;
  s.length = length;
  s.packed = packed;
  s.first = keep_first < packed ? keep_first : packed;
  s.first_chunk = s.first / kChunkTokens;
  s.chunks = packed / kChunkTokens - s.first_chunk;
  s.first_tiles = (s.first + kZoneTokens - 1) / kZoneTokens;
  s.tail_tiles = (length - packed + kZoneTokens - 1) / kZoneTokens;
  s.zone_log2 = zone_log2;
  return s;
}

struct UnitRange {
  int begin = 0;
  int end = 0;
};

// Units [0, total) in equal contiguous shares, the first ones a unit longer where they must be.
class Shares {
 public:
  constexpr Shares(int total, int count) : base_(total / count), longer_(total % count) {}

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
