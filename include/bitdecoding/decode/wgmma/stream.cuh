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

  __device__ GroupStream(const DecodeArguments& a, GroupStorage<S>& storage)
      : a_(a),
        storage_(storage),
        lane_(arch::lane_id()),
        warp_(Threads::warp()),
        weights_row_(weights_row<S>(warp_, lane_)),
        scaled_(operand_b<S>(storage.scaled)) {}

  // Nothing is on its way between segments: O takes the registers.
  __device__ void load_query(const SegmentPlace& /*segment*/) {}

  __device__ void begin_segment(const SegmentPlace& segment) {
    const int warp = Threads::warp(), lane = arch::lane_id();
    Query<Q> query;
    decode::load_query<Q>(a_, segment, S::columns, first_column<S>(warp), lane, query.q);
    Threads::sync();  // the last segment's partial is read
    begin_queries<S>(query, a_.problem, warp, lane, storage_);
    publish_operand();
    storage_.is_true[warp] = 0;
    Threads::sync();
    output_.reset();
  }

  // `meanwhile`: is done once, beside the products.
  template <class Meanwhile>
  __device__ void attend(const ItemTokens& tokens, std::uint8_t* bytes,
                         const Meanwhile& meanwhile) {
    if (tokens.flags & ItemTokens::zone) {
      meanwhile();
      attend_zone(tokens.end, bytes);
    } else {
      attend_packed(tokens, bytes, meanwhile);
    }
  }

  // The segment's result, by all threads; it is there after a barrier.
  __device__ void store(Partial<S>& partial) {
    const int lane = arch::lane_id(), warp = Threads::warp();
    const auto column = [&](int c) { return c / 2 * 8 + lane % 4 * 2 + c % 2; };
    make_true();
#pragma unroll
    for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
      const float sum = sum_of_rows(output_.sums.p[c]);
      const float zero = sum_of_rows(output_.sums.zero[c]);
      if (lane < 4) {
        storage_.of_warps[0][warp][column(c)] = sum;
        storage_.of_warps[1][warp][column(c)] = zero;
      }
    }
    Threads::sync();  // the operands are no longer read either
#pragma unroll
    for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
      const float zero = sum_of_warps(1, column(c));
#pragma unroll
      for (int i = 0; i < 2 * GroupShape<S>::output_tiles; ++i) {
        const int tile = i / 2, row = i % 2;
        const int channel = warp * GroupShape<S>::warp_channels + 16 * tile + 8 * row + lane / 4;
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

  __device__ float sum_of_warps(int which, int column) const {
    const auto& sums = storage_.of_warps[which];
    return (sums[0][column] + sums[1][column]) + (sums[2][column] + sums[3][column]);
  }

  // The chunks of a packed item, both at once where they have the same Q'.
  template <class Meanwhile>
  __device__ void attend_packed(const ItemTokens& tokens, std::uint8_t* bytes,
                                const Meanwhile& meanwhile) {
    bool new_group = tokens.flags & ItemTokens::new_group;
    const bool one_query =
        S::page.k_axis == KAxis::token || !(tokens.flags & ItemTokens::later_groups);
    const int step = one_query ? 2 * kChunkTokens : kChunkTokens;
#pragma unroll 1
    for (int token = 0; token < tokens.end; token += step) {
      if (S::page.k_axis == KAxis::channel && new_group) {
        begin_channel_group<S>(Page(a_.record, bytes), warp_, lane_, storage_);
        publish_operand();
        Threads::sync();
      }
      if (tokens.end - token >= 2 * kChunkTokens && one_query) {
        attend_chunks<2>(bytes, tokens.begin, 0, meanwhile);
      } else {
        attend_chunks<1>(bytes, tokens.begin - token, token / kChunkTokens, [&] {
          if (token == 0) meanwhile();
        });
      }
      new_group = tokens.flags & ItemTokens::later_groups;
      bytes += a_.record.chunk_stride();
    }
    if (tokens.flags & ItemTokens::bad_page) {
#pragma unroll
      for (float& sum : output_.sums.p) sum = NAN;
    }
  }

  using Axis = std::conditional_t<S::page.k_axis == KAxis::channel, ChannelAxis, TokenAxis>;
  using Tokens = LaneTokens<Axis>;

  __device__ Page page(std::uint8_t* bytes, int chunk) const {
    return Page(a_.record, bytes + chunk * a_.record.chunk_stride());
  }

  // Tokens before `begin` of the chunk count for nothing.
  __device__ Tokens load_tokens(const Page& page, int begin) const {
    const int first = 16 * warp_ + lane_ / 4;
    Tokens tokens{{}, {page.v_token_vectors(0), warp_, lane_}, {first < begin, first + 8 < begin}};
    tokens.v.mask(tokens.is_masked, 0.f);
    if constexpr (S::page.k_axis == KAxis::token) {
      tokens.axis.tokens = TokenPair(page.k_token_vectors(0), warp_, lane_);
      tokens.axis.tokens.mask(tokens.is_masked, 1.f);  // of scores that are -inf
    }
    return tokens;
  }

  // Tokens before `begin` (of the first chunk) are not attended to. Scores of the second chunk are
  // under way while the first one's become weights.
  template <int Chunks, class Meanwhile>
  __device__ void attend_chunks(std::uint8_t* bytes, int begin, int place,
                                const Meanwhile& meanwhile) {
    constexpr int kLast = Chunks - 1;
    Tokens tokens[Chunks];
    GroupTile<S> tSrS[Chunks];
    ValueWords<S> words[Chunks];
    output_.sums.save(storage_, Threads::thread());
    // Where m must rise, scores are made once more: most chunks need them only once.
    for (bool rises = false;; rises = true) {
      FragmentA tSrK[S::tiles];
      KWords<S> key_words;
      load_words<S>(page(bytes, 0).k_units(0), lane_, warp_, key_words);
      bool overflows = false;
      begin_scores<S>(key_words, scaled_, tSrK, tSrS[0]);
      load_words<S>(page(bytes, kLast).k_units(0), lane_, warp_, key_words);
      tokens[0] = load_tokens(page(bytes, 0), begin);
      if (!rises) meanwhile();
      end_scores<S>(tokens[0].is_masked, begin, tSrS[0]);
      if constexpr (Chunks == 2) {
        begin_scores<S>(key_words, scaled_, tSrK, tSrS[1]);
        if (!rises) overflows |= weigh(tokens[0], place, tSrS[0]);
        tokens[1] = load_tokens(page(bytes, 1), begin - kChunkTokens);
        end_scores<S>(tokens[1].is_masked, begin, tSrS[1]);
      }
      if (rises) {
        output_.sums.restore(storage_, Threads::thread());
        raise_group_maximum<Chunks, S, Threads>(tokens, tSrS, warp_, lane_, storage_, output_);
        Threads::sync();
        if (Chunks == 2) weigh(tokens[0], place, tSrS[0]);
      }
      overflows |= weigh(tokens[kLast], place + kLast, tSrS[kLast]);
#pragma unroll
      for (int c = 0; c < Chunks; ++c) words[c] = ValueWords<S>(page(bytes, c), warp_, lane_);
      publish_operand();
      if (!Threads::any(overflows && !rises)) break;
    }
    ValuePipe<S> pipe;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      pipe.begin(words[c], weights_operand(place + c), c, output_);
    }
    end_values<S>(output_);
  }

  // Scores to p and weights; see weigh_group.
  __device__ bool weigh(const Tokens& tokens, int place, GroupTile<S>& tSrS) {
    return weigh_group<S>(storage_, tokens.axis, tokens.v, lane_, tSrS, output_.sums,
                          storage_.weights[place] + weights_row_);
  }

  // Of weights in one of their two places.
  __device__ OperandB weights_operand(int place) const {
    using Storage = GroupStorage<S>;
    constexpr int kBytes = sizeof(storage_.weights[0]);
    constexpr int kFirst = offsetof(Storage, weights) - offsetof(Storage, scaled);
    return {scaled_.low + ((kFirst + place * kBytes) >> 4)};
  }

  __device__ void make_true() {
    int& is_true = storage_.is_true[Threads::warp()];
    if (is_true != 0) return;
    output_.make_true();
    __syncwarp();  // all lanes have read it
    is_true = 1;
    __syncwarp();
  }

  __device__ void attend_zone(int end, std::uint8_t* bytes) {
    const int lane = arch::lane_id(), warp = Threads::warp();
    make_true();
    ColumnTensor<Q> sums;
    weigh_zone<S>(bytes, end, warp, lane, storage_.weights[0], storage_, sums);
    publish_operand();
    Threads::sync();
    add_zone_values<S>(bytes + kZoneTokens * zone_row_bytes(S::head_dim), end, warp, lane,
                       weights_operand(0), storage_, sums, output_);
  }

  const DecodeArguments& a_;
  GroupStorage<S>& storage_;
  int lane_, warp_;
  int weights_row_;
  OperandB scaled_;
  GroupOutput<S> output_;
};

}  // namespace bitdecoding::decode
