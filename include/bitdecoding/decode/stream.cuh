// SPDX-License-Identifier: Apache-2.0
// One warp, a flash-decoding stream of its own: its items in order, through its own ring of stages,
// into its own m, l and O. No CTA barrier; the copies of the next items are always under way.
//   load item i + stages - 1 | scores -> mask -> maximum -> weights -> values of item i
#pragma once

#include <type_traits>

#include "bitdecoding/decode/groups.hpp"
#include "bitdecoding/decode/item_cursor.cuh"
#include "bitdecoding/decode/load_async.cuh"
#include "bitdecoding/decode/load_bulk.cuh"
#include "bitdecoding/decode/merge.cuh"

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
    const auto* k = reinterpret_cast<const std::uint8_t*>(
        c.side + c.side_offset(c.slots[cursor.sequence()], cursor.kv_head(), 0) +
        cursor.zone_row() * kHeadDim);
    const int v_bytes = (c.keep_first + c.tail_tokens) * kHeadDim * 2;
    loader_.template load_zone<kHeadDim>(load_stage_, k, k + v_bytes,
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

template <DecodeConfig Config, class Groups>
class Stream {
 public:
  using S = Shape<Config>;

  __device__ Stream(const DecodeArguments& a, const Groups& groups, int lane)
      : a_(a), groups_(groups), lane_(lane) {}

  __device__ void begin_segment(const Item& item) {
    const int tile = item.head % a_.column_tiles;
    load_query<S>(query_, a_.problem, item.sequence, item.head / a_.column_tiles,
                  {tile * S::columns, a_.columns, a_.group}, lane_);
    if constexpr (S::page.k_axis == KAxis::token) prepare_token_axis();
    softmax_.reset();
    output_.reset();
  }

  __device__ void attend(const Item& item, const std::uint8_t* bytes) {
    if (item.flags & Item::zone) {
      attend_zone(item, bytes);
    } else {
      attend_packed(item, bytes);
    }
  }

  __device__ Output<S>& output() { return output_; }
  __device__ Softmax<S>& softmax() { return softmax_; }

 private:
  using Scale = ScoreScale<S, Groups::kMostChunkGroups>;

  // Per-token K needs q only times the positions, and its sums over every 32 channels.
  __device__ void prepare_token_axis() {
    const FragmentA ones{{0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u}};
#pragma unroll
    for (int i = 0; i < cute::size(query_.q); ++i) query_.scaled(i) = query_.q(i);
    apply_positions<S>(query_.scaled);
#pragma unroll
    for (int span = 0; span < S::tiles / 2; ++span) {
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n) {
        auto sum = cute::make_tensor<float>(cute::Shape<_4>{});
        cute::clear(sum);
        mma(sum, ones, query_.q(_, n, 2 * span));
        mma(sum, ones, query_.q(_, n, 2 * span + 1));
        sums_[span](0, n) = sum(0);
        sums_[span](1, n) = sum(1);
      }
    }
  }

  // The chunks of a packed item, one after the other.
  __device__ void attend_packed(const Item& item, const std::uint8_t* bytes) {
    bool new_group = item.flags & Item::new_group;
#pragma unroll 1
    for (int token = 0; token < item.end; token += kChunkTokens) {
      attend_chunk(new_group, item.begin - token, bytes);
      // The next chunk begins groups of its own unless one group spans the page.
      new_group = a_.record.format().k_group <= kChunkTokens;
      bytes += a_.record.chunk_stride();
    }
    if (item.flags & Item::bad_page) cute::fill(softmax_.sum, NAN);
  }

  // Tokens before `begin` (of the chunk) are not attended to.
  __device__ void attend_chunk(bool new_group, int begin, const std::uint8_t* bytes) {
    const layout::PackedKvPage<S::page, const std::uint8_t> page(a_.record, bytes);
    ScoreTensor<S, kChunkBlocks> tSrS;
    cute::clear(tSrS);
    if constexpr (S::page.k_axis == KAxis::channel) {
      score_channel_axis<S>(page, groups_, query_, new_group, lane_, tSrS, scale_);
    } else {
      scale_.set_identity();
      score_token_axis<S>(page, groups_, query_, sums_, lane_, tSrS);
    }
    Scale scale = scale_;
    if (groups_.token_norm()) {
      apply_norms<S>(page, lane_, tSrS, scale_);
      scale.set_identity();
    }
    if (begin > 0) mask_scores<S, kChunkBlocks>(begin, kChunkTokens, lane_, tSrS);
    const float exponent = scale_exponent<S>(page, groups_, begin, lane_);
    update_maximum<S, kChunkBlocks>(tSrS, scale, exponent, softmax_,
                                    [&](int e, int n, float f) { output_.rescale(e, n, f); });
    const float shift = weight_shift(exponent);
    WeightTensor<S, kChunkBlocks> tOrP;
    make_weights<S, kChunkBlocks>(tSrS, scale, shift, softmax_, tOrP);
    add_values<S>(page, groups_, tOrP, shift, begin, lane_, output_);
  }

  __device__ void attend_zone(const Item& item, const std::uint8_t* bytes) {
    output_.make_true();
    ScoreTensor<S, 1> tSrS;
    cute::clear(tSrS);
    score_zone<S>(bytes, query_, lane_, tSrS);
    mask_scores<S, 1>(0, item.end, lane_, tSrS);
    ScoreScale<S, 1> scale;
    scale.set_identity();
    scale.factor[0] = query_.scale;
    update_maximum<S, 1>(tSrS, scale, 0.f, softmax_,
                         [&](int e, int n, float f) { output_.rescale(e, n, f); });
    WeightTensor<S, 1> tOrP;
    make_weights<S, 1>(tSrS, scale, 0.f, softmax_, tOrP);
    add_zone<S>(bytes + kZoneTokens * zone_row_bytes(S::head_dim), tOrP, item.end, lane_, output_);
  }

  const DecodeArguments& a_;
  Groups groups_;
  int lane_;
  Query<S> query_;
  ColumnTensor<S> sums_[S::tiles / 2];  // per-token K only
  Scale scale_;                         // of the current channel-axis groups
  Softmax<S> softmax_;
  Output<S> output_;
};

}  // namespace bitdecoding::decode
