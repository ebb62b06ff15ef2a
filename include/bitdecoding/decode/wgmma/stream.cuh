// SPDX-License-Identifier: Apache-2.0
// One warpgroup, a flash-decoding stream of its own: its items in order, into its own m, l and O. No
// CTA barrier; of a chunk one barrier of the group, which publishes the weights and votes on m.
//   K codes, Q' -> S^T -> p, weights to shared memory -> vote -> V codes, weights -> O^T
#pragma once

#include "bitdecoding/decode/groups.hpp"
#include "bitdecoding/decode/ring.cuh"
#include "bitdecoding/decode/wgmma/zones.cuh"

namespace bitdecoding::decode {

template <DecodeConfig Config>
class GroupStream {
 public:
  using S = Shape<Config>;
  using Q = WarpColumns<S>;  // the warp's quarter
  using Threads = StreamThreads<Config>;
  using QueryBits = decode::QueryBits<Q>;

  __device__ GroupStream(const DecodeArguments& a, GroupStorage<S>& storage)
      : a_(a),
        storage_(storage),
        lane_(arch::lane_id()),
        warp_(Threads::warp()),
        first_token_(16 * warp_ + lane_ / 4),
        barrier_(Threads::barrier()),
        weights_row_(weights_row<S>(warp_, lane_)),
        scaled_(operand_b<S>(storage.scaled)),
        weights_(operand_b<S>(storage.weights[0])) {}

  // `head`: virtual, see SegmentPlace. The queries are on their way until begin_segment.
  __device__ QueryBits load_query(int sequence, int head) const {
    const int kv_head = a_.column_tiles == 1 ? head : head / a_.column_tiles;
    const int tile = head - kv_head * a_.column_tiles;
    QueryBits bits;
    decode::load_query<Q>(a_.problem, sequence, kv_head,
                          {tile * S::columns + first_column<S>(warp_), a_.columns, a_.group}, lane_,
                          bits);
    return bits;
  }

  __device__ void begin_segment(const QueryBits& bits) {
    Threads::sync();  // the last segment's partial is read
    begin_queries<S>(bits, a_.problem, warp_, lane_, storage_);
    publish_operand();
    Threads::sync();
    output_.reset();
  }

  __device__ void attend(const ItemTokens& tokens, std::uint8_t* bytes) {
    if (tokens.flags & ItemTokens::zone) {
      attend_zone(tokens.end, bytes);
    } else {
      attend_packed(tokens, bytes);
    }
  }

  // The segment's result, by all threads; it is there after a barrier.
  __device__ void store(Partial<S>& partial) {
    output_.make_true();
#pragma unroll
    for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
      const float sum = sum_of_rows(output_.sum[c]), zero = sum_of_rows(output_.zero_sum[c]);
      if (lane_ < 4) {
        storage_.of_warps[0][warp_][column(c)] = sum;
        storage_.of_warps[1][warp_][column(c)] = zero;
      }
    }
    Threads::sync();  // the operands are no longer read either
#pragma unroll
    for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
      const float zero = sum_of_warps(1, column(c));
#pragma unroll
      for (int i = 0; i < 2 * GroupShape<S>::output_tiles; ++i) {
        const int tile = i / 2, row = i % 2;
        const int channel = warp_ * GroupShape<S>::warp_channels + 16 * tile + 8 * row + lane_ / 4;
        partial.o[column(c)][channel] = output_.tOrO[tile].d[c / 2 * 4 + 2 * row + c % 2] + zero;
      }
    }
    const int mine = Threads::thread();
    if (mine >= S::columns) return;
    partial.maximum[mine] = storage_.maximum[mine] - kWeightExponent<S>;
    partial.sum[mine] = sum_of_warps(0, mine);
  }

 private:
  using Page = layout::PackedKvPage<S::page, std::uint8_t>;

  __device__ int column(int c) const { return c / 2 * 8 + lane_ % 4 * 2 + c % 2; }
  __device__ float sum_of_warps(int which, int column) const {
    const auto& sums = storage_.of_warps[which];
    return (sums[0][column] + sums[1][column]) + (sums[2][column] + sums[3][column]);
  }

  // The chunks of a packed item, one after the other.
  __device__ void attend_packed(const ItemTokens& tokens, std::uint8_t* bytes) {
    bool new_group = tokens.flags & ItemTokens::new_group;
#pragma unroll 1
    for (int token = 0; token < tokens.end; token += kChunkTokens) {
      const Page page(a_.record, bytes);
      if (S::page.k_axis == KAxis::channel && new_group) {
        begin_channel_group<S>(page, warp_, lane_, storage_);
        publish_operand();
        Threads::sync();
      }
      attend_chunk(page, tokens.begin - token);
      new_group = tokens.flags & ItemTokens::later_groups;
      bytes += a_.record.chunk_stride();
    }
    if (tokens.flags & ItemTokens::bad_page) {
#pragma unroll
      for (float& sum : output_.sum) sum = NAN;
    }
  }

  using Axis = std::conditional_t<S::page.k_axis == KAxis::channel, ChannelAxis, TokenAxis>;

  __device__ Axis load_axis(const Page& page, const bool (&is_masked)[2]) const {
    if constexpr (S::page.k_axis == KAxis::channel) {
      return {};
    } else {
      TokenPair tokens(page.k_token_vectors(0), warp_, lane_);
      tokens.mask(is_masked, 1.f);  // of scores that are -inf
      return {tokens};
    }
  }

  // Tokens before `begin` (of the chunk) are not attended to.
  __device__ void attend_chunk(const Page& page, int begin) {
    OperandB weights = weights_operand();
    weights.low = __shfl_sync(0xffffffffu, weights.low, 0);
    const bool is_masked[2] = {first_token_ < begin, first_token_ + 8 < begin};
    GroupTile<S> tSrS[1];
    TokenPair v;
    ValueWords<S> words;
    // Where m must rise, scores are made once more: most chunks need them only once.
    for (bool rises = false;; rises = true) {
      KWords<S> key_words;
      load_words<S>(page.k_units(0), lane_, warp_, key_words);
      FragmentA tSrK[S::tiles];
      begin_scores<S>(key_words, scaled_, tSrK, tSrS);
      words = ValueWords<S>(page, warp_, lane_);
      v = TokenPair(page.v_token_vectors(0), warp_, lane_);
      v.mask(is_masked, 0.f);
      const Axis axis = load_axis(page, is_masked);
      cute::warpgroup_wait<0>();
      fence<S>(tSrS);
      if (begin > 0) mask(is_masked, tSrS[0]);
      if (rises) {
        raise_group_maximum<S, Threads>(axis, v, tSrS[0], warp_, lane_, storage_, output_);
        Threads::sync();
      }
      const bool overflows =
          weigh_group<S>(storage_, axis, v, lane_, tSrS[0], storage_.weights[turn_] + weights_row_);
      publish_operand();
      if (!arch::any_of_warpgroup(barrier_, overflows && !rises)) break;
    }
    add_values(words, weights);
    add_sums<S>(tSrS[0], v, output_);
    end_values<S>(output_);
    turn_ ^= 1;
  }

  __device__ void add_values(const ValueWords<S>& words, OperandB weights) {
    constexpr int kTiles = GroupShape<S>::output_tiles;
    FragmentA tOrV[kChunkBlocks * kTiles];
#pragma unroll
    for (int i = 0; i < kChunkBlocks * kTiles; ++i) {
      tOrV[i] = words.fragment(i % kTiles, i / kTiles);
    }
    begin_values<kChunkBlocks, S>(tOrV, weights, output_);
  }

  __device__ static void mask(const bool (&is_masked)[2], GroupTile<S>& tSrS) {
#pragma unroll
    for (int d = 0; d < GroupShape<S>::accumulators; ++d) {
      if (is_masked[d / 2 % 2]) tSrS.d[d] = -INFINITY;
    }
  }

  // Of the chunk's weights.
  __device__ OperandB weights_operand() const {
    constexpr int kBytes = sizeof(storage_.weights[0]);
    return {weights_.low + turn_ * (kBytes / 16)};
  }

  __device__ void attend_zone(int end, std::uint8_t* bytes) {
    output_.make_true();
    ColumnTensor<Q> sums;
    weigh_zone<S>(bytes, end, warp_, lane_, storage_.weights[turn_], storage_, sums);
    publish_operand();
    Threads::sync();
    add_zone_values<S>(bytes + kZoneTokens * zone_row_bytes(S::head_dim), end, warp_, lane_,
                       weights_operand(), storage_, sums, output_);
    turn_ ^= 1;
  }

  const DecodeArguments& a_;
  GroupStorage<S>& storage_;
  int lane_, warp_;
  int first_token_;  // of a chunk; the lane's other one is 8 behind
  int barrier_;
  int weights_row_;
  OperandB scaled_, weights_;
  int turn_ = 0;  // of the weights' two places
  GroupOutput<S> output_;
};

}  // namespace bitdecoding::decode
