// SPDX-License-Identifier: Apache-2.0
// S^T = K Q^T of one item, in accumulator order. A score in the log2 domain is
//   acc * factor + bias     factor, bias per query column and half of the chunk (tSrS stays raw)
// Per-channel K: factor and bias come with each group's Q'. Per-token K and token norms finish the
// scores in place; then factor is 1 and bias 0.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "bitdecoding/decode/query.cuh"

namespace bitdecoding::decode {

// Affine maps of the two halves (32 tokens) of a chunk.
template <class S>
struct ScoreScale {
  ColumnTensor<S> factor[2];
  ColumnTensor<S> bias[2];

  __device__ void set_identity() {
    for (int half = 0; half < 2; ++half) {
      cute::fill(factor[half], 1.f);
      cute::clear(bias[half]);
    }
  }
};

// Eight fp16 of a lane's accumulator rows (token 8i + g), i = 2 * block + u.
struct RowValues {
  uint4 bits;

  __device__ float operator()(int i) const {
    const std::uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    const __half2 pair = as_half2(words[i / 2]);
    return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
  }
};

// acc (block) += codes of one 16-token block times Q', channel tiles [first, last).
template <class S, class Units, class Accumulator>
__device__ void score_block(const Units& units, int block, int lane, const QueryTensor<S>& scaled,
                            int first_tile, int last_tile, Accumulator&& acc) {
  constexpr int kTiles = S::K::tiles_per_word;
#pragma unroll
  for (int unit = 0; unit < S::K::k_units; ++unit) {
    if ((unit + 1) * S::K::k_unit_words * kTiles <= first_tile) continue;
    if (unit * S::K::k_unit_words * kTiles >= last_tile) continue;
    const auto words = units(lane, unit, block);
#pragma unroll
    for (int word = 0; word < S::K::k_unit_words; ++word) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int k = (unit * S::K::k_unit_words + word) * kTiles + tile;
        if (k < first_tile || k >= last_tile) continue;
        const FragmentA tSrK = k_fragment<S::page.k_bits>(words.word[word], tile);
#pragma unroll
        for (int n = 0; n < S::n_tiles; ++n) mma(acc(_, n), tSrK, scaled(_, n, k));
      }
    }
  }
}

// Per-channel K: a chunk is one group, part of one, or two of 32 tokens.
template <class S, class Page>
__device__ void score_channel_axis(const Page& page, Query<S>& query, bool new_group, int lane,
                                   ScoreTensor<S, kChunkBlocks>& tSrS, ScoreScale<S>& scale) {
  const bool halves = page.record().format().k_group == kChunkTokens / 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 0 ? new_group : halves) {
      apply_channel_group<S>(query, page.k_group_vectors(half), lane, scale.factor[half],
                             scale.bias[half]);
      if (half == 0) {
        scale.factor[1] = scale.factor[0];
        scale.bias[1] = scale.bias[0];
      }
    }
#pragma unroll
    for (int block = 2 * half; block < 2 * half + 2; ++block) {
      score_block<S>(page.k_units(0), block, lane, query.scaled, 0, S::tiles, tSrS(_, _, block));
    }
  }
}

// Per-token K: scale and zero act on the rows; groups of channels have accumulators of their own.
// `sums` (group of 32 channels): the column sums of q over the channels of each 32.
template <class S, class Page>
__device__ void score_token_axis(const Page& page, const Query<S>& query,
                                 const ColumnTensor<S> (&sums)[S::tiles / 2], int lane,
                                 ScoreTensor<S, kChunkBlocks>& tSrS) {
  const int k_group = page.record().format().k_group;
  auto partial = cute::make_tensor_like(tSrS);
  auto zero_weight = cute::make_tensor_like(query.scale);
  cute::clear(partial);
  cute::clear(zero_weight);
#pragma unroll
  for (int span = 0; span < S::tiles / 2; ++span) {
#pragma unroll
    for (int block = 0; block < kChunkBlocks; ++block) {
      score_block<S>(page.k_units(0), block, lane, query.scaled, 2 * span, 2 * span + 2,
                     partial(_, _, block));
    }
#pragma unroll
    for (int i = 0; i < cute::size(zero_weight); ++i) zero_weight(i) += sums[span](i);
    if (!begins_group(32 * span + 32, k_group)) continue;
    const auto vectors = page.k_token_vectors(group_of(32 * span, k_group));
    const RowValues scales{vectors(lane / 4, 0)}, zeros{vectors(lane / 4, 1)};
#pragma unroll
    for (int block = 0; block < kChunkBlocks; ++block) {
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 2 * block + e / 2;
          tSrS(e, n, block) +=
              query.scale(e % 2, n) * (partial(e, n, block) * kCodeFactor * scales(row) +
                                       zero_weight(e % 2, n) * zeros(row));
        }
      }
    }
    cute::clear(partial);
    cute::clear(zero_weight);
  }
}

// Norms multiply the finished score; the map becomes the identity.
template <class S, class Page>
__device__ void apply_norms(const Page& page, int lane, ScoreTensor<S, kChunkBlocks>& tSrS,
                            const ScoreScale<S>& scale) {
  const RowValues norms{page.norm_vectors()(lane / 4)};
#pragma unroll
  for (int block = 0; block < kChunkBlocks; ++block) {
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& s = tSrS(e, n, block);
        s = (s * scale.factor[block / 2](e % 2, n) + scale.bias[block / 2](e % 2, n)) *
            norms(2 * block + e / 2);
      }
    }
  }
}

// 16 fp16 tokens of a zone. `rows`: K rows in shared memory, zone_row_bytes apart.
template <class S>
__device__ void score_zone(const std::uint8_t* rows, const Query<S>& query, int lane,
                           ScoreTensor<S, 1>& tSrS) {
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
    const std::uint8_t* row =
        rows + lane % 16 * zone_row_bytes(S::head_dim) + 32 * k + lane / 16 * 16;
    FragmentA a;
    cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(row), a.a[0], a.a[1],
                                  a.a[2], a.a[3]);
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) mma(tSrS(_, n, 0), a, query.q(_, n, k));
  }
}

// Rows outside [begin, end) of an item get -inf, whatever was there.
template <class S, int Blocks>
__device__ void mask_scores(int begin, int end, int lane, ScoreTensor<S, Blocks>& tSrS) {
#pragma unroll
  for (int block = 0; block < Blocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = 16 * block + lane / 4 + 8 * (e / 2);
      if (token >= begin && token < end) continue;
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n) tSrS(e, n, block) = -INFINITY;
    }
  }
}

}  // namespace bitdecoding::decode
