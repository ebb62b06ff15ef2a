// SPDX-License-Identifier: Apache-2.0
// Products of K's codes and the bytes of q.
#pragma once

#include "bitdecoding/decode/bytes/query.cuh"
#include "bitdecoding/decode/scores.cuh"

namespace bitdecoding::decode {

// Of a 16-token block, the sums over even and over odd fields.
template <Bytes S>
struct CodeSums {
  ByteSums fields[2];

  __device__ CodeSums() {
    for (ByteSums& sums : fields) cute::clear(sums);
  }
  // += channel tiles 2 * pair and 2 * pair + 1.
  __device__ void add(const KWords<S>& words, const QueryBytes<S>& bytes, int pair) {
    mma_signed(fields[pair % 2], k_bytes<S>(words, pair), bytes(_, pair));
  }
  // Of that pair alone; even fields count less by kOddField.
  __device__ float of_pair(int row, int pair) const {
    const ByteSums& sums = fields[pair % 2];
    return static_cast<float>(static_cast<int>(sums(2 * row) * kUpperByte + sums(2 * row + 1)));
  }
  // Below 2^31: codes count up to 240 in at most 256 channels, q's bytes make up at most 32385.
  __device__ float operator()(int row) const {
    constexpr int kOdd = kOddField<S::page.k_bits>;
    const std::uint32_t upper = fields[0](2 * row) * kOdd + fields[1](2 * row);
    const std::uint32_t lower = fields[0](2 * row + 1) * kOdd + fields[1](2 * row + 1);
    return static_cast<float>(static_cast<int>(upper * kUpperByte + lower));
  }
};

// Blocks [first, last) of a chunk, all channels: raw sums.
template <Bytes S, class Units>
__device__ void score_blocks(const Units& units, int first, int last, int lane,
                             const Query<S>& query, ScoreTensor<S, kChunkBlocks>& tSrS) {
#pragma unroll
  for (int block = first; block < last; ++block) {
    KWords<S> words;
    load_words<S>(units, lane, block, words);
    CodeSums<S> sums;
#pragma unroll
    for (int pair = 0; pair < S::tiles / 2; ++pair) sums.add(words, query.bytes, pair);
    tSrS(0, 0, block) = sums(0);
    tSrS(1, 0, block) = sums(1);
  }
}

// Per-token K: scale and zero act on the rows; groups of channels have sums of their own.
// `query_sums` (32 channels): of q over them.
template <Bytes S, class Groups, class Page>
__device__ void score_token_axis(const Page& page, const Groups& groups, const Query<S>& query,
                                 const QuerySums<S>& query_sums, int lane,
                                 ScoreTensor<S, kChunkBlocks>& tSrS) {
  cute::clear(tSrS);
#pragma unroll
  for (int block = 0; block < kChunkBlocks; ++block) {
    KWords<S> words;
    load_words<S>(page.k_units(0), lane, block, words);
    CodeSums<S> sums;
    float zero_weight = 0.f;
#pragma unroll
    for (int pair = 0; pair < S::tiles / 2; ++pair) {
      sums.add(words, query.bytes, pair);
      zero_weight += query_sums[pair](0);
      if (!begins_group(32 * pair + 32, groups.k_token_group())) continue;
      const auto vectors = page.k_token_vectors(group_of(32 * pair, groups.k_token_group()));
      const RowValues scales{vectors(lane / 4, 0)}, zeros{vectors(lane / 4, 1)};
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        tSrS(row, 0, block) +=
            query.scale(0) * (sums(row) * query.factor(0) * scales(2 * block + row) +
                              zero_weight * zeros(2 * block + row));
      }
      sums = CodeSums<S>();
      zero_weight = 0.f;
    }
  }
}

// Blocks of K, a pair of channel tiles each: sums of q * (code - middle) * scale.
template <Bytes S, class Page>
__device__ void score_block_axis(const Page& page, const Query<S>& query,
                                 const QuerySums<S>& query_sums, int lane,
                                 ScoreTensor<S, kChunkBlocks>& tSrS) {
  cute::clear(tSrS);
  const float factors[2] = {query.factor(0) * kOddField<S::page.k_bits>, query.factor(0)};
#pragma unroll
  for (int block = 0; block < kChunkBlocks; ++block) {
    KWords<S> words;
    load_words<S>(page.k_units(0), lane, block, words);
#pragma unroll
    for (int pair = 0; pair < S::tiles / 2; ++pair) {
      CodeSums<S> sums;
      sums.add(words, query.bytes, pair);
      const RowValues scales = block_scales(page.k_exponent_vectors(pair)(lane / 4));
      const float middle = format::block_middle(S::page.k_bits) * query_sums[pair](0);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        tSrS(row, 0, block) +=
            (sums.of_pair(row, pair) * factors[pair % 2] - middle) * scales(2 * block + row);
      }
    }
  }
}

// 16 fp16 tokens of a zone. The halves of the channels meet in different columns of an MMA.
template <Bytes S>
__device__ void score_zone(const std::uint8_t* rows, const QueryTensor<S>& q, int lane,
                           ScoreTensor<S, 1>& tSrS) {
  FragmentA tSrK[S::tiles];
  load_zone_keys<S>(rows, lane, tSrK);
  auto sum = cute::make_tensor<float>(cute::Shape<_4, _2>{});
  cute::clear(sum);
#pragma unroll
  for (int k = 0; k < S::own_tiles; ++k) {
    mma(sum(_, 0), tSrK[k], q(_, 0, k));
    mma(sum(_, 1), tSrK[k + S::own_tiles], q(_, 0, k));
  }
  tSrS(0, 0, 0) = sum(0, 0) + sum(1, 1);
  tSrS(1, 0, 0) = sum(2, 0) + sum(3, 1);
}

}  // namespace bitdecoding::decode
