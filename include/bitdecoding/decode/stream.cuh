// SPDX-License-Identifier: Apache-2.0
// One warp, a flash-decoding stream of its own: its items in order, into its own m, l and O. No CTA
// barrier. Two warps that are one stream do this for half of the columns each.
//   scores -> mask -> maximum -> weights -> values
#pragma once

#include "bitdecoding/decode/bytes/scores.cuh"
#include "bitdecoding/decode/bytes/values.cuh"
#include "bitdecoding/decode/groups.hpp"
#include "bitdecoding/decode/halves/scores.cuh"
#include "bitdecoding/decode/halves/values.cuh"
#include "bitdecoding/decode/merge.cuh"
#include "bitdecoding/decode/ring.cuh"

namespace bitdecoding::decode {

template <DecodeConfig Config, class Groups>
class Stream {
 public:
  using S = Shape<warp_config(Config)>;

  __device__ Stream(const DecodeArguments& a, const Groups& groups, int lane)
      : a_(a), groups_(groups), lane_(lane) {}

  // The queries are on their way until begin_segment.
  __device__ void load_query(const SegmentPlace& segment) {
    decode::load_query<S>(a_, segment, Config.query_columns, first_column(), arch::lane_id(),
                          query_.q);
  }

  __device__ void begin_segment(const SegmentPlace& /*segment*/) {
    set_query<S>(query_.q, query_.scale, a_.problem, arch::lane_id());
    if constexpr (S::page.k_axis != KAxis::channel) {
      prepare_token_axis<S>(query_, arch::lane_id());
      sum_query<S>(query_.q, sums_);
    }
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

  // The segment's result, by the warp.
  __device__ void store(Partial<Shape<Config>>& partial) {
    store_partial<S>(output_, softmax_, groups_, arch::lane_id(), partial, first_column());
  }

 private:
  using Scale = ScoreScale<S, Groups::kMostChunkGroups>;

  __device__ static int first_column() { return StreamThreads<Config>::warp() * S::columns; }

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
    ScoreTensor<S, kChunkBlocks> tSrS;
    if constexpr (S::page.k_axis == KAxis::channel) {
      score_channel_axis<S>(page, groups_, query_, new_group, lane_, tSrS, scale_);
    } else {
      scale_.set_identity();
      if constexpr (S::page.has_blocks()) {
        scale_.factor[0] = query_.scale;
        score_block_axis<S>(page, query_, sums_, lane_, tSrS);
      } else {
        score_token_axis<S>(page, groups_, query_, sums_, lane_, tSrS);
      }
    }
    Scale scale = scale_;
    if (groups_.token_norm()) {
      apply_norms<S>(page, lane_, tSrS, scale_);
      scale.set_identity();
    }
    if (begin > 0) mask_scores<S, kChunkBlocks>(begin, kChunkTokens, arch::lane_id(), tSrS);
    add_chunk<S>(page, groups_, scale, lane_, tSrS, softmax_, output_);
  }

  __device__ void attend_zone(int end, std::uint8_t* bytes) {
    const int lane = arch::lane_id();
    ScoreTensor<S, 1> tSrS;
    score_zone<S>(bytes, query_.q, lane, tSrS);
    mask_scores<S, 1>(0, end, lane, tSrS);
    ScoreScale<S, 1> scale;
    scale.set_identity();
    scale.factor[0] = query_.scale;
    add_zone<S>(bytes + kZoneTokens * zone_row_bytes(S::head_dim), scale, end, lane, tSrS, softmax_,
                output_);
  }

  const DecodeArguments& a_;
  Groups groups_;
  int lane_;
  Query<S> query_;
  QuerySums<S> sums_;  // per-token K and blocks only
  Scale scale_;        // of the current channel-axis groups
  Softmax<S> softmax_;
  Output<S, Groups> output_;
};

}  // namespace bitdecoding::decode
