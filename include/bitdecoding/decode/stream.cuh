// SPDX-License-Identifier: Apache-2.0
// One warp, a flash-decoding stream of its own: its items in order, into its own m, l and O. No CTA
// barrier.   scores -> mask -> maximum -> weights -> values
#pragma once

#include "bitdecoding/decode/groups.hpp"
#include "bitdecoding/decode/ring.cuh"
#include "bitdecoding/decode/values.cuh"

namespace bitdecoding::decode {

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
