// SPDX-License-Identifier: Apache-2.0
// One warp, a flash-decoding stream of its own: its items in order, through its own ring of stages,
// into its own m, l and O. No CTA barrier; the copies of the next items are always under way.
//   load item i + stages - 1 | scores -> mask -> maximum -> weights -> values of item i
#pragma once

#include <type_traits>

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

template <DecodeConfig Config>
using Loader = std::conditional_t<Config.arch == Arch::sm90, BulkLoader, AsyncLoader>;

// A warp's ring: stages of bytes, what each holds, and the loads that fill them.
template <DecodeConfig Config>
class Ring {
 public:
  __device__ Ring(const DecodeArguments& a, std::uint8_t* stages, Item* items,
                  std::uint64_t* barriers, UnitRange range, int lane)
      : a_(a),
        stages_(stages),
        items_(items),
        loader_(barriers, a.stages, lane),
        cursor_(a.problem.cache, a.batch, range, lane),
        lane_(lane) {
    for (int i = 0; i < a.stages - 1; ++i) load_next();
    __syncwarp();
  }

  __device__ bool empty() const { return held_ == 0; }
  // The oldest item; its bytes only after wait().
  __device__ Item item() const { return items_[stage_]; }
  __device__ const std::uint8_t* bytes() const { return stages_ + stage_ * a_.stage_bytes; }
  __device__ void wait() { loader_.wait(stage_, phase_, a_.stages); }

  // Loads one more item; call after wait(), when all lanes are past the previous item.
  __device__ void load_next() {
    if (!cursor_.done()) {
      const PagedKvCache& c = a_.problem.cache;
      if (lane_ == 0) items_[load_stage_] = cursor_.item();
      std::uint8_t* to = stages_ + load_stage_ * a_.stage_bytes;
      if (cursor_.head() != head_) {
        head_ = cursor_.head();
        kv_head_ = head_ / a_.column_tiles;
      }
      if (cursor_.is_packed()) {
        load_chunk(c, to);
      } else {
        const auto* k = reinterpret_cast<const std::uint8_t*>(
            c.side + c.side_offset(c.slots[cursor_.sequence()], kv_head_, 0) +
            cursor_.zone_row() * c.format.head_dim);
        const int v_bytes = (c.keep_first + c.tail_tokens) * c.format.head_dim * 2;
        loader_.load_zone(load_stage_, k, k + v_bytes, to, c.format.head_dim);
      }
      cursor_.advance();
      load_stage_ = load_stage_ + 1 == a_.stages ? 0 : load_stage_ + 1;
      ++held_;
    }
    loader_.commit();
  }

  __device__ void release() {
    __syncwarp();
    --held_;
    if (++stage_ == a_.stages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

 private:
  __device__ void load_chunk(const PagedKvCache& c, std::uint8_t* to) {
    const layout::PageRecord& record = a_.record;
    const bool begins = cursor_.begins_group();
    const std::uint8_t* page =
        c.pool +
        static_cast<std::int64_t>(cursor_.page_id() * c.num_kv_heads + kv_head_) * a_.page_bytes;
    // A stage is laid out like the first chunk of a page.
    const int offset = begins ? 0 : record.k_codes(0);
    const int from = cursor_.chunk_of_page() == 0 ? 0
                     : begins                     ? record.chunk(1)
                                                  : record.k_codes(1);
    const std::uint8_t* group = !begins && cursor_.is_first_of_warp() ? page : nullptr;
    loader_.load_chunk(load_stage_, page + from, to + offset, record.chunk(1) - offset, group, to,
                       record.k_codes(0));
  }

  const DecodeArguments& a_;
  std::uint8_t* stages_;
  Item* items_;
  Loader<Config> loader_;
  ItemCursor cursor_;
  int lane_;
  int held_ = 0;
  int stage_ = 0, phase_ = 0;
  int load_stage_ = 0;
  int head_ = -1, kv_head_ = 0;  // of the item loaded last
};

template <DecodeConfig Config>
class Stream {
 public:
  using S = Shape<Config>;

  __device__ Stream(const DecodeArguments& a, int lane) : a_(a), lane_(lane) {}

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
      attend_chunk(item, bytes);
    }
  }

  __device__ Output<S>& output() { return output_; }
  __device__ Softmax<S>& softmax() { return softmax_; }

 private:
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

  __device__ void attend_chunk(const Item& item, const std::uint8_t* bytes) {
    const layout::PackedKvPage<S::page, const std::uint8_t> page(a_.record, bytes);
    const KvFormat& format = a_.record.format();
    ScoreTensor<S, kChunkBlocks> tSrS;
    cute::clear(tSrS);
    if constexpr (S::page.k_axis == KAxis::channel) {
      score_channel_axis<S>(page, query_, item.flags & Item::new_group, lane_, tSrS, scale_);
    } else {
      scale_.set_identity();
      score_token_axis<S>(page, query_, sums_, lane_, tSrS);
    }
    ScoreScale<S> scale = scale_;
    if (format.token_norm) {
      apply_norms<S>(page, lane_, tSrS, scale);
      scale.set_identity();
    }
    if (item.begin > 0) mask_scores<S, kChunkBlocks>(item.begin, item.end, lane_, tSrS);
    const float exponent = scale_exponent<S>(page, lane_);
    update_maximum<S, kChunkBlocks>(tSrS, scale, exponent, softmax_,
                                    [&](int e, int n, float f) { output_.rescale(e, n, f); });
    const float shift = -fminf(exponent, 0.f);
    WeightTensor<S, kChunkBlocks> tOrP;
    make_weights<S, kChunkBlocks>(tSrS, scale, shift, softmax_, tOrP);
    add_values<S>(page, tOrP, shift, lane_, output_);
  }

  __device__ void attend_zone(const Item& item, const std::uint8_t* bytes) {
    output_.make_true();
    ScoreTensor<S, 1> tSrS;
    cute::clear(tSrS);
    score_zone<S>(bytes, query_, lane_, tSrS);
    mask_scores<S, 1>(0, item.end, lane_, tSrS);
    ScoreScale<S> scale;
    scale.set_identity();
    scale.factor[0] = query_.scale;
    update_maximum<S, 1>(tSrS, scale, 0.f, softmax_,
                         [&](int e, int n, float f) { output_.rescale(e, n, f); });
    WeightTensor<S, 1> tOrP;
    make_weights<S, 1>(tSrS, scale, 0.f, softmax_, tOrP);
    add_zone<S>(bytes + kZoneTokens * zone_row_bytes(S::head_dim), tOrP, item.end, lane_, output_);
  }

  const DecodeArguments& a_;
  int lane_;
  Query<S> query_;
  ColumnTensor<S> sums_[S::tiles / 2];  // per-token K only
  ScoreScale<S> scale_;                 // of the current channel-axis group
  Softmax<S> softmax_;
  Output<S> output_;
};

}  // namespace bitdecoding::decode
