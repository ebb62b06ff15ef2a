// SPDX-License-Identifier: Apache-2.0
// A warp's walk through its items: which bytes come next. Everything is the same in all lanes.
#pragma once

#include "bitdecoding/decode/decode_problem.hpp"
#include "bitdecoding/decode/work.hpp"

namespace bitdecoding::decode {

// What the consumer must know of an item; travels through shared memory beside the bytes.
struct alignas(16) Item {
  enum Flags : int { first = 1, last = 2, whole = 4, zone = 8, new_group = 16 };
  int sequence;
  int head;                 // virtual: KV head * column tiles + tile
  std::int16_t begin, end;  // attended tokens of the item
  int flags;
  int segment_begin;  // unit of the batch
};

struct BatchShape {
  int heads;  // virtual heads
  int zone_log2;
};

class ItemCursor {
 public:
  __device__ ItemCursor(const PagedKvCache& cache, const BatchShape& shape, UnitRange range,
                        int lane)
      : cache_(cache),
        shape_(shape),
        range_(range),
        lane_(lane),
        chunks_in_page_(cache.format.chunks()),
        group_mask_(cache.format.k_axis == KAxis::channel && cache.format.k_group > kChunkTokens
                        ? cache.format.k_group / kChunkTokens - 1
                        : 0) {
    if (range.begin < range.end) find_start();
  }

  __device__ bool done() const { return done_; }

  // The current item, before `advance`.
  __device__ Item item() const {
    Item item{sequence_, head_, 0, 0, 0, segment_begin_};
    if (item_ == item_begin_) item.flags |= Item::first;
    if (item_ == item_end_ - 1) item.flags |= Item::last;
    if (item_begin_ == 0 && item_end_ == segment_.items()) item.flags |= Item::whole;
    if (is_packed()) {
      const int token = chunk() * kChunkTokens;
      item.begin = static_cast<std::int16_t>(max(0, segment_.first - token));
      item.end = kChunkTokens;
      if (item_ == item_begin_ || begins_group()) item.flags |= Item::new_group;
    } else {
      item.flags |= Item::zone;
      item.end = static_cast<std::int16_t>(min(kZoneTokens, zone_end() - zone_token()));
    }
    return item;
  }

  __device__ bool is_packed() const { return item_ < segment_.chunks; }
  __device__ int sequence() const { return sequence_; }
  __device__ int head() const { return head_; }
  __device__ bool is_first_of_warp() const { return item_ == item_begin_; }

  // ---- packed items ----
  __device__ int chunk() const { return segment_.first_chunk + item_; }  // of the sequence
  __device__ int chunk_of_page() const { return chunk() & (chunks_in_page_ - 1); }
  __device__ bool begins_group() const { return (chunk() & group_mask_) == 0; }
  __device__ int page_id() {
    const int page = chunks_in_page_ == 1 ? chunk() : chunk() >> 1;
    if (static_cast<unsigned>(page - pages_begin_) >= 32u) {
      pages_begin_ = page;
      const int mine = min(page + lane_, cache_.max_pages - 1);
      page_ids_ =
          cache_.block_table[static_cast<std::int64_t>(sequence_) * cache_.max_pages + mine];
    }
    return __shfl_sync(0xffffffffu, page_ids_, page - pages_begin_);
  }

  // ---- 16-bit items ----
  // First row of the tile in the sequence's slot.
  __device__ int zone_row() const {
    const int tile = item_ - segment_.chunks;
    if (tile < segment_.first_tiles) return tile * kZoneTokens;
    return cache_.tail_row(zone_token());
  }

  __device__ void advance() {
    if (++item_ < item_end_) return;
    segment_begin_ += segment_.weight();
    if (++head_ == shape_.heads) {
      head_ = 0;
      next_sequence();
    }
    enter_segment();
  }

 private:
  __device__ int zone_token() const {
    const int tile = item_ - segment_.chunks;
    if (tile < segment_.first_tiles) return tile * kZoneTokens;
    return segment_.packed + (tile - segment_.first_tiles) * kZoneTokens;
  }
  __device__ int zone_end() const {
    return item_ - segment_.chunks < segment_.first_tiles ? segment_.first : segment_.length;
  }

  __device__ SegmentItems load_segment(int sequence) const {
    return segment_items(cache_.lengths[sequence], cache_.packed[sequence], cache_.keep_first,
                         shape_.zone_log2);
  }

  // Moves to the sequence and head that hold the range's first unit: 32 sequences at a time.
  __device__ void find_start() {
    int begin = 0;
    for (int base = 0; base < cache_.batch; base += 32) {
      const int mine = base + lane_;
      const int weight = mine < cache_.batch ? load_segment(mine).weight() * shape_.heads : 0;
      int end = weight;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, end, distance);
        if (lane_ >= distance) end += below;
      }
      const unsigned holds = __ballot_sync(0xffffffffu, begin + end > range_.begin);
      if (holds != 0) {
        const int owner = __ffs(static_cast<int>(holds)) - 1;
        sequence_ = base + owner;
        segment_begin_ = begin + __shfl_sync(0xffffffffu, end - weight, owner);
        break;
      }
      begin += __shfl_sync(0xffffffffu, end, 31);
    }
    segment_ = load_segment(sequence_);
    head_ = (range_.begin - segment_begin_) / segment_.weight();
    segment_begin_ += head_ * segment_.weight();
    enter_segment();
  }

  __device__ void next_sequence() {
    pages_begin_ = -64;
    do {
      if (++sequence_ == cache_.batch) return;
      segment_ = load_segment(sequence_);
    } while (segment_.weight() == 0);
  }

  // Sets the items of the segment that are in the range; a segment may have none.
  __device__ void enter_segment() {
    for (;;) {
      done_ = sequence_ >= cache_.batch || segment_begin_ >= range_.end;
      if (done_) return;
      const ItemRange mine = items_in(segment_, segment_begin_, range_);
      item_ = item_begin_ = mine.begin;
      item_end_ = mine.end;
      if (item_begin_ < item_end_) return;
      segment_begin_ += segment_.weight();
      if (++head_ == shape_.heads) {
        head_ = 0;
        next_sequence();
      }
    }
  }

  const PagedKvCache& cache_;
  BatchShape shape_;
  UnitRange range_;
  int lane_;
  int chunks_in_page_;  // 1 or 2
  int group_mask_;      // a chunk begins a K group where its index has none of these bits
  bool done_ = true;

  int sequence_ = 0, head_ = 0;
  SegmentItems segment_;
  int segment_begin_ = 0;
  int item_ = 0, item_begin_ = 0, item_end_ = 0;
  int pages_begin_ = -64;
  int page_ids_ = 0;
};

// Units of the whole batch, the same in all lanes.
__device__ inline int total_units(const PagedKvCache& cache, const BatchShape& shape, int lane) {
  int total = 0;
  for (int sequence = lane; sequence < cache.batch; sequence += 32) {
    total += segment_items(cache.lengths[sequence], cache.packed[sequence], cache.keep_first,
                           shape.zone_log2)
                 .weight();
  }
  for (int distance = 1; distance < 32; distance *= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, distance);
  }
  return total * shape.heads;
}

}  // namespace bitdecoding::decode
