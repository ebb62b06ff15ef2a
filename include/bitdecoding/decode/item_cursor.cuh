// SPDX-License-Identifier: Apache-2.0
// A warp's walk through its items: which bytes come next. Everything is the same in all lanes.
#pragma once

#include "bitdecoding/cache/device_error.cuh"
#include "bitdecoding/cache/sequence_state.hpp"
#include "bitdecoding/decode/decode_problem.hpp"
#include "bitdecoding/decode/work.hpp"

namespace bitdecoding::decode {

// The tokens of an item; travels through shared memory beside their bytes.
struct alignas(8) ItemTokens {
  enum Flags : int {
    first = 1,  // of the warp's in its segment, and last
    last = 2,
    whole = 4,  // the warp has all of the segment
    zone = 8,
    bad_page = 16,
    new_group = 32,     // the item's first chunk begins a channel-axis K group
    later_groups = 64,  // so does its second
    rewritten = 128,    // the warp writes to the item's stage
  };
  std::int16_t begin, end;  // attended tokens of the item
  int flags;
};

// Which segment, and where it lies among the items of the batch.
struct alignas(16) SegmentPlace {
  int sequence;
  int head;   // virtual: KV head * column tiles + tile
  int begin;  // its first
  int last;   // and last item
};

// What all warps of a launch walk through.
struct BatchShape {
  int heads;         // virtual heads
  int column_tiles;  // of a KV head
  int item_tokens;   // of a packed item: a chunk or a page
};

__device__ inline SequenceState load_state(const PagedKvCache& c, int sequence) {
  return {c.lengths[sequence], c.packed[sequence], c.slots[sequence]};
}
__device__ inline Fault find_decode_fault(const PagedKvCache& c, const SequenceState& state) {
  if (state.packed > 0 && c.num_pages == 0) return {DeviceError::packed, state.packed, 0};
  return find_fault(c, state);
}

// A faulty sequence has no items.
__device__ inline SegmentItems find_segment(const PagedKvCache& c, int item_tokens,
                                            const SequenceState& state) {
  if (has_fault(c, state) || (state.packed > 0 && c.num_pages == 0)) return {};
  return segment_items(state.length, state.packed, c.keep_first, item_tokens);
}

// Items of the batch: of one head of the `run` sequences from lane * run on, and of everything.
struct BatchItems {
  int run = 1;
  int mine = 0;
  int total = 0;
  SequenceState first;  // of the lane's first sequence
};
__device__ inline int sequences_run(const PagedKvCache& cache) { return (cache.batch + 31) / 32; }

// Of the lane's first sequence; any, if it has none.
__device__ inline SequenceState load_first_state(const PagedKvCache& cache, int lane) {
  return load_state(cache, min(lane * sequences_run(cache), cache.batch - 1));
}

// `state`: load_first_state's. Each of the others is on its way while the one before is counted.
__device__ inline BatchItems count_items(const PagedKvCache& cache, const BatchShape& shape,
                                         int lane, SequenceState state) {
  BatchItems items{sequences_run(cache), 0, 0, state};
  const int begin = lane * items.run, end = min(begin + items.run, cache.batch);
  for (int sequence = begin; sequence < end; ++sequence) {
    const SequenceState next = load_state(cache, min(sequence + 1, cache.batch - 1));
    items.mine += find_segment(cache, shape.item_tokens, state).items();
    state = next;
  }
  const auto mine = static_cast<unsigned>(items.mine);
  items.total = static_cast<int>(__reduce_add_sync(0xffffffffu, mine)) * shape.heads;
  return items;
}

inline constexpr int kPageIds = 32;  // loaded at once, a lane each

// Where a warp stands. It lies in shared memory while the warp computes: registers are for that.
struct alignas(16) CursorState {
  ItemRange range;  // of the batch, the warp's
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
        item_log2_(log2_of(shape.item_tokens)),
        page_log2_(log2_of(cache.format.page_tokens) - item_log2_) {}

  __device__ void start(ItemRange range, const BatchItems& items) {
    s_.range = range;
    if (range.begin < range.end) find_start(items);
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

  // Of the current item, before `advance`.
  __device__ SegmentPlace segment() const {
    return {s_.sequence, s_.head, s_.segment_begin, s_.segment_begin + s_.segment.items() - 1};
  }
  __device__ ItemTokens tokens() const {
    ItemTokens out{0, static_cast<std::int16_t>(shape_.item_tokens), 0};
    if (s_.item == s_.item_begin) out.flags |= ItemTokens::first | ItemTokens::new_group;
    if (s_.item == s_.item_end - 1) out.flags |= ItemTokens::last;
    if (s_.item_begin == 0 && s_.item_end == s_.segment.items()) out.flags |= ItemTokens::whole;
    if (is_packed()) {
      const int token = packed_item() << item_log2_;
      out.begin = static_cast<std::int16_t>(max(0, s_.segment.first - token));
    } else {
      out.flags |= ItemTokens::zone;
      out.end = static_cast<std::int16_t>(min(kZoneTokens, zone_end() - zone_token()));
    }
    if (out.flags & (ItemTokens::last | ItemTokens::zone) || out.begin > 0) {
      out.flags |= ItemTokens::rewritten;
    }
    return out;
  }

  __device__ bool is_packed() const { return s_.item < s_.segment.packed_items; }
  __device__ int sequence() const { return s_.sequence; }
  __device__ int head() const { return s_.head; }  // virtual
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
    s_.segment_begin += s_.segment.items();
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

  __device__ SegmentItems load_segment(int sequence) const {
    return find_segment(cache_, shape_.item_tokens, load_state(cache_, sequence));
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

  // The first of the warp's consecutive runs of items, a lane each, that reaches beyond the range's
  // first item: returns its lane and moves to its beginning; without one 32, and behind all.
  __device__ int find_run(int items) {
    int end = items;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, end, distance);
      if (lane_ >= distance) end += below;
    }
    const int target = s_.range.begin - s_.segment_begin;
    const unsigned holds = __ballot_sync(0xffffffffu, end > target);
    const int lane = holds == 0 ? 31 : __ffs(static_cast<int>(holds)) - 1;
    s_.segment_begin += __shfl_sync(0xffffffffu, holds == 0 ? end : end - items, lane);
    return holds == 0 ? 32 : lane;
  }

  // Moves to the sequence and head that hold the range's first item: to a run of sequences, then
  // within the run, 32 at a time.
  __device__ void find_start(const BatchItems& items) {
    s_.sequence = find_run(items.mine * shape_.heads) * items.run;
    for (int found = 32; items.run > 1 && found == 32 && s_.sequence < cache_.batch;) {
      const int mine = s_.sequence + lane_;
      const int count = mine < cache_.batch ? load_segment(mine).items() : 0;
      found = find_run(count * shape_.heads);
      s_.sequence += found;
    }
    if (s_.sequence >= cache_.batch) return;  // lengths have changed since they were counted
    s_.segment = find_segment_of(items);
    s_.head = static_cast<int>(static_cast<unsigned>(s_.range.begin - s_.segment_begin) /
                               static_cast<unsigned>(s_.segment.items()));
    s_.segment_begin += s_.head * s_.segment.items();
    enter_segment();
  }

  // Of s_.sequence, which has items.
  __device__ SegmentItems find_segment_of(const BatchItems& items) const {
    if (items.run > 1) return load_segment(s_.sequence);
    const auto at_hand = [&](int of_lane) {
      return __shfl_sync(0xffffffffu, of_lane, s_.sequence);
    };
    return segment_items(at_hand(items.first.length), at_hand(items.first.packed),
                         cache_.keep_first, shape_.item_tokens);
  }

  __device__ void next_sequence() {
    s_.pages_begin = -2 * kPageIds;
    do {
      if (++s_.sequence == cache_.batch) return;
      s_.segment = load_segment(s_.sequence);
    } while (s_.segment.items() == 0);
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
      s_.segment_begin += s_.segment.items();
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

}  // namespace bitdecoding::decode
