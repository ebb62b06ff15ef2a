// SPDX-License-Identifier: Apache-2.0
// A warp's ring of stages: the bytes of its next items are always under way while it computes.
#pragma once

#include <type_traits>

#include "bitdecoding/decode/item_cursor.cuh"
#include "bitdecoding/decode/load_async.cuh"
#include "bitdecoding/decode/load_bulk.cuh"

namespace bitdecoding::decode {

// What every warp of a launch is told.
struct DecodeArguments {
  DecodeProblem problem;
  layout::PageRecord record;
  BatchShape batch;
  int group = 1;         // query heads per KV head
  int columns = 1;       // query tokens * group
  int column_tiles = 1;  // of Config.query_columns
  int warps = 0;         // per CTA
  int stages = 0;
  int stage_bytes = 0;
  int page_bytes = 0;
  std::uint8_t* workspace = nullptr;
  int* counters = nullptr;  // [CTAs], zero between launches
  int* error_word = nullptr;
};

inline constexpr int kMostStages = 4;

template <DecodeConfig Config>
using Loader = std::conditional_t<Config.arch == Arch::sm90, BulkLoader, AsyncLoader>;

struct WarpStorage {
  alignas(16) Item items[kMostStages];  // what a stage holds
  alignas(8) std::uint64_t barriers[kMostStages];
  CursorStorage cursor;
};

// A warp's ring: stages of bytes, what each holds, and the loads that fill them.
template <DecodeConfig Config>
class Ring {
 public:
  __device__ Ring(const DecodeArguments& a, const BatchShape& batch, std::uint8_t* stages,
                  WarpStorage& storage, UnitRange range, int lane)
      : a_(a),
        batch_(batch),
        stages_(stages),
        storage_(storage),
        loader_(storage.barriers, a.stages, lane),
        lane_(lane) {
    ItemCursor cursor = make_cursor();
    cursor.start(range);
    for (int i = 0; i < a.stages - 1; ++i) {
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
  __device__ Item item() const { return storage_.items[stage_]; }
  __device__ std::uint8_t* bytes() const { return stages_ + stage_ * a_.stage_bytes; }
  __device__ void wait() { loader_.wait(stage_, phase_, a_.stages); }

  // Loads one more item; call after wait(), when all lanes are past the previous item.
  __device__ void load_next() {
    if (plain_items_ > 0) {
      load_plain();
    } else {
      ItemCursor cursor = make_cursor();
      cursor.load(storage_.cursor.state);
      load(cursor);
      look_ahead(cursor);
    }
    loader_.commit();
  }

  // The oldest item's bytes have been written over by the warp.
  __device__ void written() { loader_.written(); }

  __device__ void release() {
    __syncwarp();
    --held_;
    if (++stage_ == a_.stages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

 private:
  static constexpr int kHeadDim = Config.page.head_dim;

  __device__ ItemCursor make_cursor() const {
    return ItemCursor(a_.problem.cache, batch_, lane_, a_.error_word, storage_.cursor);
  }

  // The cursor's item, whatever it is.
  __device__ void load(ItemCursor& cursor) {
    if (cursor.done()) return;
    if (cursor.is_packed()) {
      cursor.find_page_ids();
      load_packed(cursor.packed_run(), cursor.item());
    } else {
      load_zone(cursor, cursor.item());
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

  __device__ void load_plain() {
    const Item item{.end = static_cast<std::int16_t>(batch_.items.packed_tokens),
                    .flags = begins_k_group(a_.record.format(), batch_.items, plain_.index)
                                 ? Item::new_group
                                 : 0};
    load_packed(plain_, item);
    --plain_items_;
    ++plain_.index;
  }

  // A stage is laid out like the start of a page, whichever part of one the item is.
  __device__ void load_packed(const PackedRun& run, Item item) {
    const layout::PageRecord& record = a_.record;
    const KvFormat& format = record.format();
    const int page_log2 = batch_.items.packed_tokens < format.page_tokens ? 1 : 0;
    int id = storage_.cursor.page_ids[(run.index >> page_log2) - run.pages_begin];
    if (id < 0) {
      id = 0;
      item.flags |= Item::bad_page;
    }
    const PagedKvCache& c = a_.problem.cache;
    const std::uint8_t* page =
        c.pool + static_cast<std::int64_t>(id * c.num_kv_heads + run.kv_head) * a_.page_bytes;
    const bool is_second = (run.index & page_log2) != 0;  // of the page's two items
    const bool begins = begins_k_group(format, batch_.items, run.index);
    const int offset = begins ? 0 : record.k_codes(0);
    const int from = !is_second ? 0 : begins ? record.chunk(1) : record.k_codes(1);
    const int bytes = record.chunk(batch_.items.packed_tokens / kChunkTokens) - offset;
    const bool lacks_group = !begins && (item.flags & Item::first);
    std::uint8_t* to = stages_ + load_stage_ * a_.stage_bytes;
    loader_.load_packed(load_stage_, page + from, to + offset, bytes, lacks_group ? page : nullptr,
                        to, record.k_codes(0));
    loaded(item);
  }

  __device__ void load_zone(const ItemCursor& cursor, const Item& item) {
    const PagedKvCache& c = a_.problem.cache;
    const auto rows = [&](int tensor) {
      return reinterpret_cast<const std::uint8_t*>(
          c.side + c.side_offset(c.slots[cursor.sequence()], cursor.kv_head(), tensor) +
          static_cast<std::int64_t>(cursor.zone_row()) * kHeadDim);
    };
    loader_.template load_zone<kHeadDim>(load_stage_, rows(0), rows(1),
                                         stages_ + load_stage_ * a_.stage_bytes);
    loaded(item);
  }

  __device__ void loaded(const Item& item) {
    if (lane_ == 0) storage_.items[load_stage_] = item;
    load_stage_ = load_stage_ + 1 == a_.stages ? 0 : load_stage_ + 1;
    ++held_;
  }

  const DecodeArguments& a_;
  const BatchShape& batch_;
  std::uint8_t* stages_;
  WarpStorage& storage_;
  Loader<Config> loader_;
  int lane_;
  int held_ = 0;
  int stage_ = 0, phase_ = 0;
  int load_stage_ = 0;
  int plain_items_ = 0;
  PackedRun plain_;  // of the next plain item
};

}  // namespace bitdecoding::decode
