// SPDX-License-Identifier: Apache-2.0
// A stream's ring of stages: the bytes of its next items are always under way while it computes.
#pragma once

#include <type_traits>

#include "bitdecoding/decode/item_cursor.cuh"
#include "bitdecoding/decode/load_async.cuh"
#include "bitdecoding/decode/load_bulk.cuh"

namespace bitdecoding::decode {

// Where the bytes of a packed item lie in its page and in its stage, which is laid out like the
// start of a page; flags of ItemTokens.
struct alignas(16) PackedBytes {
  int from = 0, to = 0, bytes = 0;
  int flags = 0;
};
enum PackedItem { whole_page, first_of_page, second_of_page };

constexpr PackedBytes packed_bytes(const layout::PageRecord& record, PackedItem item) {
  const KvFormat& f = record.format();
  // Groups span two chunks at most.
  const bool second_begins = f.k_axis != KAxis::channel || f.k_group <= kChunkTokens;
  const int later = second_begins ? ItemTokens::later_groups : 0;
  switch (item) {
    case whole_page: return {0, 0, record.chunk(f.chunks()), ItemTokens::new_group | later};
    case first_of_page: return {0, 0, record.chunk(1), ItemTokens::new_group};
    default: break;
  }
  if (second_begins) return {record.chunk(1), 0, record.chunk(1), ItemTokens::new_group};
  return {record.k_codes(1), record.k_codes(0), record.chunk(1) - record.k_codes(0), 0};
}

// What every warp of a launch is told.
struct DecodeArguments {
  DecodeProblem problem;
  layout::PageRecord record;
  PackedBytes packed[3];  // PackedItem
  BatchShape batch;
  int group = 1;         // query heads per KV head
  int columns = 1;       // query tokens * group
  int column_tiles = 1;  // of Config.query_columns
  bool has_whole_groups = false;
  int warps = 0;  // per CTA
  int stages = 0;
  int stage_bytes = 0;
  int page_bytes = 0;
  std::uint8_t* workspace = nullptr;
  int* counters = nullptr;  // [CTAs][columns], zero between launches
  int* error_word = nullptr;
};

inline constexpr int kMostStages = 4;

template <DecodeConfig Config>
using Loader = std::conditional_t<Config.arch == Arch::sm90, BulkLoader<StreamThreads<Config>>,
                                  AsyncLoader<StreamThreads<Config>>>;

// What a warp keeps in shared memory: registers are for the arithmetic.
struct WarpStorage {
  BatchShape batch;
  bool has_empty;                      // the batch has sequences without items
  Shares shares;                       // of the CTAs
  SegmentPlace segments[kMostStages];  // what a stage holds
  ItemTokens tokens[kMostStages];
  alignas(8) std::uint64_t barriers[kMostStages];
  CursorStorage cursor;
};

// A stream's ring: stages of bytes, what each holds, and the loads that fill them.
template <DecodeConfig Config>
class Ring {
 public:
  // `barriers`: in the storage of the stream's first warp; `storage`: of this one.
  __device__ Ring(const DecodeArguments& a, std::uint8_t* stages, std::uint64_t* barriers,
                  WarpStorage& storage, int lane)
      : a_(a), stages_(stages), storage_(storage), loader_(barriers, a.stages, lane), lane_(lane) {}

  // Where the warp's items begin; the ring fills from there.
  __device__ ItemCursor start(ItemRange range, const BatchItems& items) const {
    ItemCursor cursor = make_cursor();
    cursor.start(range, items);
    return cursor;
  }
  __device__ void fill(ItemCursor& cursor) {
    for (int i = 0; i < a_.stages - 1; ++i) {
      load(cursor);
      loader_.commit();
    }
    look_ahead(cursor);
  }

  __device__ bool empty() const { return held_ == 0; }
  // The oldest item is the only one left.
  __device__ bool is_last() const { return held_ == 1; }
  __device__ int stage() const { return stage_; }
  // The oldest item; its bytes only after wait().
  __device__ ItemTokens tokens() const { return storage_.tokens[stage_]; }
  // Of the oldest item and of the one behind it, where they are last and first of a segment.
  __device__ const SegmentPlace& segment() const { return storage_.segments[stage_]; }
  __device__ const SegmentPlace& next_segment() const {
    return storage_.segments[stage_ + 1 == a_.stages ? 0 : stage_ + 1];
  }
  __device__ std::uint8_t* bytes() const { return stages_ + stage_ * a_.stage_bytes; }
  __device__ void wait(const ItemTokens& tokens) {
    loader_.wait(stage_, phase_, a_.stages, (tokens.flags & ItemTokens::zone) != 0);
  }

  // Loads one more item; call after wait(), when all threads are past the previous item.
  __device__ void load_next() {
    if (next_is_plain()) {
      load_plain();
    } else {
      load_any();
    }
  }
  // The same in two parts: plain items are loaded in a few instructions.
  __device__ bool next_is_plain() const { return plain_items_ > 0; }
  __device__ void load_any() {
    ItemCursor cursor = make_cursor();
    cursor.load(storage_.cursor.state);
    load(cursor);
    look_ahead(cursor);
    loader_.commit();
  }
  __device__ void load_plain() {
    const auto end = static_cast<std::int16_t>(storage_.batch.item_tokens);
    load_packed(free_stage(), plain_, {0, end, 0}, false);
    --plain_items_;
    ++plain_.index;
    loader_.commit();
  }

  // The oldest item's bytes have been written over by the stream.
  __device__ void written() { loader_.written(); }

  __device__ void release() {
    StreamThreads<Config>::sync();
    --held_;
    if (++stage_ == a_.stages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

 private:
  static constexpr int kHeadDim = Config.page.head_dim;

  __device__ ItemCursor make_cursor() const {
    return ItemCursor(a_.problem.cache, storage_.batch, lane_, a_.error_word, storage_.cursor);
  }

  // The cursor's item, whatever it is.
  __device__ void load(ItemCursor& cursor) {
    if (cursor.done()) return;
    const int stage = free_stage();
    const ItemTokens tokens = cursor.tokens();
    if (lane_ == 0) storage_.segments[stage] = cursor.segment();
    if (cursor.is_packed()) {
      cursor.find_page_ids();
      load_packed(stage, cursor.packed_run(), tokens, (tokens.flags & ItemTokens::first) != 0);
    } else {
      load_zone(stage, cursor, tokens);
    }
    cursor.advance();
  }

  // Packed items that come next need no cursor.
  __device__ void look_ahead(ItemCursor& cursor) {
    plain_items_ = cursor.plain_items();
    if (plain_items_ > 0) {
      plain_ = cursor.packed_run();
      cursor.skip(plain_items_);
    }
    cursor.save(storage_.cursor.state);
  }

  // The warp's first item may lack the parameters of a group that begins in the chunk before.
  __device__ void load_packed(int stage, const PackedRun& run, ItemTokens tokens, bool is_first) {
    const int page_log2 = storage_.batch.item_tokens < a_.record.format().page_tokens;
    const int second = run.index & page_log2;  // of the page's two items
    const PackedBytes& piece = a_.packed[page_log2 + second];
    int id = storage_.cursor.page_ids[(run.index >> page_log2) - run.pages_begin];
    tokens.flags |= piece.flags;
    if (id < 0) {
      id = 0;
      tokens.flags |= ItemTokens::bad_page;
    }
    const PagedKvCache& c = a_.problem.cache;
    const std::uint8_t* page =
        c.pool + static_cast<std::int64_t>(id * c.num_kv_heads + run.kv_head) * a_.page_bytes;
    const bool lacks_group = is_first && piece.to > 0;
    std::uint8_t* to = stages_ + stage * a_.stage_bytes;
    loader_.load_packed(stage, page + piece.from, to + piece.to, piece.bytes,
                        lacks_group ? page : nullptr, to, piece.to);
    loaded(stage, tokens);
  }

  __device__ void load_zone(int stage, const ItemCursor& cursor, const ItemTokens& tokens) {
    const PagedKvCache& c = a_.problem.cache;
    const auto rows = [&](int tensor) {
      return reinterpret_cast<const std::uint8_t*>(
          c.side + c.side_offset(c.slots[cursor.sequence()], cursor.kv_head(), tensor) +
          static_cast<std::int64_t>(cursor.zone_row()) * kHeadDim);
    };
    loader_.template load_zone<kHeadDim>(stage, rows(0), rows(1), stages_ + stage * a_.stage_bytes);
    loaded(stage, tokens);
  }

  // The stage behind those that are held.
  __device__ int free_stage() const {
    const int stage = stage_ + held_;
    return stage < a_.stages ? stage : stage - a_.stages;
  }

  __device__ void loaded(int stage, const ItemTokens& tokens) {
    if (lane_ == 0) storage_.tokens[stage] = tokens;
    ++held_;
  }

  const DecodeArguments& a_;
  std::uint8_t* stages_;
  WarpStorage& storage_;
  Loader<Config> loader_;
  int lane_;
  int held_ = 0;
  int stage_ = 0, phase_ = 0;
  int plain_items_ = 0;
  PackedRun plain_;  // of the next plain item
};

}  // namespace bitdecoding::decode
