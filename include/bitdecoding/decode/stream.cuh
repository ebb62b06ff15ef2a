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

  // `head`: virtual, see SegmentPlace. The queries are on their way until begin_segment.
  __device__ QueryBits<S> load_query(int sequence, int head) const {
    const int kv_head = a_.column_tiles == 1 ? head : head / a_.column_tiles;
    const int tile = head - kv_head * a_.column_tiles;
    QueryBits<S> bits;
    decode::load_query<S>(a_.problem, sequence, kv_head, {tile * S::columns, a_.columns, a_.group},
                          arch::lane_id(), bits);
    return bits;
  }

  __device__ void begin_segment(const QueryBits<S>& bits) {
    set_query<S>(query_, bits, a_.problem.type, a_.problem.softmax_scale, arch::lane_id());
    if constexpr (S::page.k_axis == KAxis::token) prepare_token_axis();
    softmax_.reset();
    output_.reset();
  }

  __device__ void attend(const ItemTokens& tokens, std::uint8_t* bytes) {
    if (tokens.flags & ItemTokens::zone) {
      attend_zone(tokens.end, bytes);
    } else {
      attend_packed(tokens, bytes);
    }
  }

  __device__ Output<S, Groups>& output() { return output_; }
  __device__ const Softmax<S>& softmax() const { return softmax_; }
  __device__ const Groups& groups() const { return groups_; }

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
  __device__ void attend_packed(const ItemTokens& tokens, std::uint8_t* bytes) {
    bool new_group = tokens.flags & ItemTokens::new_group;
#pragma unroll 1
    for (int token = 0; token < tokens.end; token += kChunkTokens) {
      attend_chunk(new_group, tokens.begin - token, bytes);
      new_group = tokens.flags & ItemTokens::later_groups;
      bytes += a_.record.chunk_stride();
    }
    if (tokens.flags & ItemTokens::bad_page) cute::fill(softmax_.sum, NAN);
  }

  // Tokens before `begin` (of the chunk) are not attended to.
  __device__ void attend_chunk(bool new_group, int begin, std::uint8_t* bytes) {
    const layout::PackedKvPage<S::page, std::uint8_t> page(a_.record, bytes);
    if (begin > 0) clear_values<S>(page, groups_, begin, arch::lane_id());
    const int exponent = scale_exponent<S>(page, groups_, lane_);
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
    if (begin > 0) mask_scores<S, kChunkBlocks>(begin, kChunkTokens, arch::lane_id(), tSrS);
    update_maximum<S, kChunkBlocks>(tSrS, scale, static_cast<float>(exponent), softmax_,
                                    [&](int e, int n, float f) { output_.rescale(e, n, f); });
    exponentiate<S, kChunkBlocks>(tSrS, scale, softmax_);
    add_zeros<S>(page, groups_, tSrS, lane_, output_);
    add_values<S>(page, groups_, tSrS, exponent, lane_, output_);
  }

  __device__ void attend_zone(int end, std::uint8_t* bytes) {
    const int lane = arch::lane_id();
    output_.make_true();
    ScoreTensor<S, 1> tSrS;
    cute::clear(tSrS);
    score_zone<S>(bytes, query_, lane, tSrS);
    mask_scores<S, 1>(0, end, lane, tSrS);
    ScoreScale<S, 1> scale;
    scale.set_identity();
    scale.factor[0] = query_.scale;
    update_maximum<S, 1>(tSrS, scale, 0.f, softmax_,
                         [&](int e, int n, float f) { output_.rescale(e, n, f); });
    exponentiate<S, 1>(tSrS, scale, softmax_);
    add_zone<S>(bytes + kZoneTokens * zone_row_bytes(S::head_dim), tSrS, end, lane, output_);
  }

  const DecodeArguments& a_;
  Groups groups_;
  int lane_;
  Query<S> query_;
  ColumnTensor<S> sums_[S::tiles / 2];  // per-token K only
  Scale scale_;                         // of the current channel-axis groups
  Softmax<S> softmax_;
  Output<S, Groups> output_;
};

}  // namespace bitdecoding::decode
