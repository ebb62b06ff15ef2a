// SPDX-License-Identifier: Apache-2.0
// A warp's walk through its items: which bytes come next. Everything is the same in all lanes.
#pragma once

#include "bitdecoding/cache/device_error.cuh"
#include "bitdecoding/cache/sequence_state.hpp"
#include "bitdecoding/decode/decode_problem.hpp"
#include "bitdecoding/decode/work.hpp"

namespace bitdecoding::decode {

// What the consumer must know of an item; travels through shared memory beside the bytes.
struct alignas(16) Item {
  enum Flags : int { first = 1, last = 2, whole = 4, zone = 8, new_group = 16, bad_page = 32 };
  int sequence;
  int head;                 // virtual: KV head * column tiles + tile
  std::int16_t begin, end;  // attended tokens of the item
  int flags;
  int segment_begin;  // units of the batch at which the segment's first
  int segment_last;   // and last item begin
};

// Whether a packed item, by its index in the sequence, begins a channel-axis K group or has all its
// parameters anyway: groups span two chunks at most.
constexpr bool begins_k_group(const KvFormat& f, const ItemShape& shape, int index) {
  return f.k_axis == KAxis::token || f.k_group <= shape.packed_tokens || index % 2 == 0;
}

// What all warps of a launch walk through.
struct BatchShape {
  int heads;         // virtual heads
  int column_tiles;  // of a KV head
  ItemShape items;
};

__device__ inline SequenceState load_state(const PagedKvCache& c, int sequence) {
  return {c.lengths[sequence], c.packed[sequence], c.slots[sequence]};
}
__device__ inline Fault find_decode_fault(const PagedKvCache& c, const SequenceState& state) {
  if (state.packed > 0 && c.num_pages == 0) return {DeviceError::packed, state.packed, 0};
  return find_fault(c, state);
}

// A faulty sequence has no items.
__device__ inline SegmentItems load_segment(const PagedKvCache& c, const ItemShape& shape,
                                            int sequence) {
  const SequenceState state = load_state(c, sequence);
  if (has_fault(c, state) || (state.packed > 0 && c.num_pages == 0)) return {};
  return segment_items(state.length, state.packed, c.keep_first, shape);
}

inline constexpr int kPageIds = 32;  // loaded at once, a lane each

// Where a warp stands. It lies in shared memory while the warp computes: registers are for that.
struct alignas(16) CursorState {
  UnitRange range;  // units of the warp
  int sequence = 0, head = 0, kv_head = 0;
  int segment_begin = 0;
  int item = 0, item_begin = 0, item_end = 0;  // of the segment: now, and those in the range
  int pages_begin = -kPageIds;  // column of the block table that page_ids begins with
  bool done = true;
  SegmentItems segment;
};
struct CursorStorage {
  CursorState state;
  int page_ids[kPageIds];  // -1: outside the pool
};

// Packed items of one segment, one after the other.
struct PackedRun {
  int index = 0;        // of the first in the sequence
  int pages_begin = 0;  // see CursorState
  int kv_head = 0;
};

class ItemCursor {
 public:
  __device__ ItemCursor(const PagedKvCache& cache, const BatchShape& shape, int lane,
                        int* error_word, CursorStorage& storage)
      : cache_(cache),
        shape_(shape),
        lane_(lane),
        error_word_(error_word),
        page_ids_(storage.page_ids),
        item_log2_(log2_of(shape.items.packed_tokens)),
        page_log2_(log2_of(cache.format.page_tokens) - item_log2_) {}

  __device__ void start(UnitRange range) {
    s_.range = range;
    if (range.begin < range.end) find_start();
  }
  __device__ void load(const CursorState& from) { s_ = from; }
  __device__ void save(CursorState& to) const {
    __syncwarp();
    if (lane_ == 0) to = s_;
    __syncwarp();
  }

  __device__ bool done() const { return s_.done; }

  // How many items from the current one on are nothing but the next packed tokens: neither first
  // nor last of the warp in their segment, their page ids known.
  __device__ int plain_items() const {
    if (s_.done || s_.item == s_.item_begin) return 0;
    const int known = ((s_.pages_begin + kPageIds) << page_log2_) - s_.segment.first_item;
    return max(0, min(min(s_.item_end - 1, s_.segment.packed_items), known) - s_.item);
  }
  __device__ void skip(int items) { s_.item += items; }

  // The current item, before `advance`.
  __device__ Item item() const {
    Item out{s_.sequence,
             s_.head,
             0,
             0,
             0,
             s_.segment_begin,
             s_.segment_begin + s_.segment.last_begin()};
    if (s_.item == s_.item_begin) out.flags |= Item::first;
    if (s_.item == s_.item_end - 1) out.flags |= Item::last;
    if (s_.item_begin == 0 && s_.item_end == s_.segment.items()) out.flags |= Item::whole;
    if (is_packed()) {
      const int token = packed_item() << item_log2_;
      out.begin = static_cast<std::int16_t>(max(0, s_.segment.first - token));
      out.end = static_cast<std::int16_t>(shape_.items.packed_tokens);
      if (s_.item == s_.item_begin || begins_k_group(cache_.format, shape_.items, packed_item())) {
        out.flags |= Item::new_group;
      }
    } else {
      out.flags |= Item::zone;
      out.end = static_cast<std::int16_t>(min(kZoneTokens, zone_end() - zone_token()));
    }
    return out;
  }

  __device__ bool is_packed() const { return s_.item < s_.segment.packed_items; }
  __device__ int sequence() const { return s_.sequence; }
  __device__ int kv_head() const { return s_.kv_head; }

  // ---- packed items ----
  __device__ int packed_item() const { return s_.segment.first_item + s_.item; }  // of the sequence
  // Loads the page ids that are not at hand.
  __device__ void find_page_ids() {
    const int page = packed_item() >> page_log2_;
    if (static_cast<unsigned>(page - s_.pages_begin) >= kPageIds) load_page_ids(page);
  }
  // Where the item and those behind it are.
  __device__ PackedRun packed_run() const { return {packed_item(), s_.pages_begin, s_.kv_head}; }

  // ---- 16-bit items ----
  // First row of the tile in the sequence's slot.
  __device__ int zone_row() const {
    const int tile = s_.item - s_.segment.packed_items;
    if (tile < s_.segment.first_tiles) return tile * kZoneTokens;
    return cache_.tail_row(zone_token());
  }

  __device__ void advance() {
    if (++s_.item < s_.item_end) return;
    s_.segment_begin += s_.segment.weight();
    if (++s_.head == shape_.heads) {
      s_.head = 0;
      next_sequence();
    }
    enter_segment();
  }

 private:
  // Ids outside the pool are reported and become -1.
  __device__ void load_page_ids(int first_page) {
    const int page = first_page + lane_;
    int id = 0;
    if (page < s_.segment.packed >> log2_of(cache_.format.page_tokens)) {
      id = cache_.block_table[static_cast<std::int64_t>(s_.sequence) * cache_.max_pages + page];
      if (static_cast<unsigned>(id) >= static_cast<unsigned>(cache_.num_pages)) {
        report(error_word_, s_.sequence, id, cache_.num_pages, DeviceError::page_id);
        id = -1;
      }
    }
    s_.pages_begin = first_page;
    __syncwarp();
    page_ids_[lane_] = id;
    __syncwarp();
  }

  __device__ int zone_token() const {
    const int tile = s_.item - s_.segment.packed_items;
    if (tile < s_.segment.first_tiles) return tile * kZoneTokens;
    return s_.segment.packed + (tile - s_.segment.first_tiles) * kZoneTokens;
  }
  __device__ int zone_end() const {
    return s_.item - s_.segment.packed_items < s_.segment.first_tiles ? s_.segment.first
                                                                      : s_.segment.length;
  }

  // Moves to the sequence and head that hold the range's first unit: 32 sequences at a time.
  __device__ void find_start() {
    int begin = 0;
    for (int base = 0; base < cache_.batch; base += 32) {
      const int mine = base + lane_;
      const int weight = mine < cache_.batch
                             ? load_segment(cache_, shape_.items, mine).weight() * shape_.heads
                             : 0;
      int end = weight;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, end, distance);
        if (lane_ >= distance) end += below;
      }
      const unsigned holds = __ballot_sync(0xffffffffu, begin + end > s_.range.begin);
      if (holds != 0) {
        const int owner = __ffs(static_cast<int>(holds)) - 1;
        s_.sequence = base + owner;
        s_.segment_begin = begin + __shfl_sync(0xffffffffu, end - weight, owner);
        break;
      }
      begin += __shfl_sync(0xffffffffu, end, 31);
    }
    s_.segment = load_segment(cache_, shape_.items, s_.sequence);
    s_.head = (s_.range.begin - s_.segment_begin) / s_.segment.weight();
    s_.segment_begin += s_.head * s_.segment.weight();
    enter_segment();
  }

  __device__ void next_sequence() {
    s_.pages_begin = -2 * kPageIds;
    do {
      if (++s_.sequence == cache_.batch) return;
      s_.segment = load_segment(cache_, shape_.items, s_.sequence);
    } while (s_.segment.weight() == 0);
  }

  // Sets the items of the segment that are in the range; a segment may have none.
  __device__ void enter_segment() {
    for (;;) {
      s_.done = s_.sequence >= cache_.batch || s_.segment_begin >= s_.range.end;
      if (s_.done) return;
      const ItemRange mine = items_in(s_.segment, s_.segment_begin, s_.range);
      s_.item = s_.item_begin = mine.begin;
      s_.item_end = mine.end;
      s_.kv_head = shape_.column_tiles == 1 ? s_.head : s_.head / shape_.column_tiles;
      if (s_.item_begin < s_.item_end) return;
      s_.segment_begin += s_.segment.weight();
      if (++s_.head == shape_.heads) {
        s_.head = 0;
        next_sequence();
      }
    }
  }

  const PagedKvCache& cache_;
  BatchShape shape_;
  int lane_;
  int* error_word_;
  int* page_ids_;
  int item_log2_;  // tokens of a packed item
  int page_log2_;  // packed items of a page
  CursorState s_;
};

// Units of the whole batch, the same in all lanes.
__device__ inline int total_units(const PagedKvCache& cache, const BatchShape& shape, int lane) {
  int total = 0;
  for (int sequence = lane; sequence < cache.batch; sequence += 32) {
    total += load_segment(cache, shape.items, sequence).weight();
  }
  return static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(total))) *
         shape.heads;
}

}  // namespace bitdecoding::decode
