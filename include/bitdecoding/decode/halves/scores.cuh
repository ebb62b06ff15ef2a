// SPDX-License-Identifier: Apache-2.0
// Products of K's codes and fp16 queries.
#pragma once

#include "bitdecoding/decode/halves/query.cuh"
#include "bitdecoding/decode/scores.cuh"

namespace bitdecoding::decode {

// sums (block) += codes of `Count` 16-token blocks times queries, channel tiles [first, last).
template <int Count, Halves S, class Units>
__device__ void add_codes_of(const Units& units, int first_block, int lane,
                             const QueryTensor<S>& scaled, int first_tile, int last_tile,
                             ScoreTensor<S, kChunkBlocks>& sums) {
  constexpr int kTiles = S::K::k_unit_words * S::K::tiles_per_word;  // of a unit
#pragma unroll
  for (int unit = 0; unit < S::K::k_units; ++unit) {
    if ((unit + 1) * kTiles <= first_tile || unit * kTiles >= last_tile) continue;
    std::remove_cvref_t<decltype(units(0, 0, 0))> words[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) words[i] = units(lane, unit, first_block + i);
    __syncwarp();  // all words are under way before the first MMA
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int k = unit * kTiles + tile;
      if (k < first_tile || k >= last_tile) continue;
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const FragmentA tSrK = k_halves<S::page.k_bits>(words[i].word, tile);
#pragma unroll
        for (int n = 0; n < S::n_tiles; ++n) {
          mma(mma_tile<S>(sums, n, first_block + i), tSrK, scaled(_, n, k));
        }
      }
    }
  }
}

// The same of blocks [first, last): four MMAs in turns, so that none waits for the one before.
template <Halves S, class Units>
__device__ void add_codes(const Units& units, int first_block, int last_block, int lane,
                          const QueryTensor<S>& scaled, int first_tile, int last_tile,
                          ScoreTensor<S, kChunkBlocks>& sums) {
  constexpr int kTurns = 4 / S::n_tiles;
#pragma unroll
  for (int block = first_block; block < last_block; block += kTurns) {
    if (last_block - block >= kTurns) {
      add_codes_of<kTurns, S>(units, block, lane, scaled, first_tile, last_tile, sums);
    } else {
      add_codes_of<2, S>(units, block, lane, scaled, first_tile, last_tile, sums);
    }
  }
}

// Blocks [first, last) of a chunk, all channels: raw sums.
template <Halves S, class Units>
__device__ void score_blocks(const Units& units, int first, int last, int lane,
                             const Query<S>& query, ScoreTensor<S, kChunkBlocks>& tSrS) {
#pragma unroll
  for (int i = 4 * S::n_tiles * first; i < 4 * S::n_tiles * last; ++i) tSrS.data()[i] = 0.f;
  add_codes<S>(units, first, last, lane, query.scaled, 0, S::tiles, tSrS);
}

// Per-token K: scale and zero act on the rows; groups of channels have sums of their own.
// `query_sums` (32 channels): of q over them.
template <Halves S, class Groups, class Page>
__device__ void score_token_axis(const Page& page, const Groups& groups, const Query<S>& query,
                                 const QuerySums<S>& query_sums, int lane,
                                 ScoreTensor<S, kChunkBlocks>& tSrS) {
  cute::clear(tSrS);
  ScoreTensor<S, kChunkBlocks> sums;
  ColumnTensor<S> zero_weight;
  cute::clear(sums);
  cute::clear(zero_weight);
#pragma unroll
  for (int pair = 0; pair < S::tiles / 2; ++pair) {
    add_codes<S>(page.k_units(0), 0, kChunkBlocks, lane, query.scaled, 2 * pair, 2 * pair + 2,
                 sums);
#pragma unroll
    for (int c = 0; c < S::lane_columns; ++c) zero_weight(c) += query_sums[pair](c);
    if (!begins_group(32 * pair + 32, groups.k_token_group())) continue;
    const auto vectors = page.k_token_vectors(group_of(32 * pair, groups.k_token_group()));
    const RowValues scales{vectors(lane / 4, 0)}, zeros{vectors(lane / 4, 1)};
#pragma unroll
    for (int row = 0; row < 2 * kChunkBlocks; ++row) {
#pragma unroll
      for (int c = 0; c < S::lane_columns; ++c) {
        tSrS(row % 2, c, row / 2) +=
            query.scale(c) *
            (sums(row % 2, c, row / 2) * kCodeFactor * scales(row) + zero_weight(c) * zeros(row));
      }
    }
    cute::clear(sums);
    cute::clear(zero_weight);
  }
}

// Blocks of K, a pair of channel tiles each: sums of q * (code - middle) * scale.
template <Halves S, class Page>
__device__ void score_block_axis(const Page& page, const Query<S>& query,
                                 const QuerySums<S>& query_sums, int lane,
                                 ScoreTensor<S, kChunkBlocks>& tSrS) {
  cute::clear(tSrS);
#pragma unroll
  for (int pair = 0; pair < S::tiles / 2; ++pair) {
    ScoreTensor<S, kChunkBlocks> sums;
    cute::clear(sums);
    add_codes<S>(page.k_units(0), 0, kChunkBlocks, lane, query.scaled, 2 * pair, 2 * pair + 2,
                 sums);
    const RowValues scales = block_scales(page.k_exponent_vectors(pair)(lane / 4));
#pragma unroll
    for (int c = 0; c < S::lane_columns; ++c) {
      const float middle = format::block_middle(S::page.k_bits) * query_sums[pair](c);
#pragma unroll
      for (int row = 0; row < 2 * kChunkBlocks; ++row) {
        tSrS(row % 2, c, row / 2) +=
            (sums(row % 2, c, row / 2) * kCodeFactor - middle) * scales(row);
      }
    }
  }
}

// 16 fp16 tokens of a zone.
template <Halves S>
__device__ void score_zone(const std::uint8_t* rows, const QueryTensor<S>& q, int lane,
                           ScoreTensor<S, 1>& tSrS) {
  constexpr int kTiles = std::min(S::tiles, kZoneTiles);
  ScoreTensor<S, 1> odd;
  cute::clear(tSrS);
  cute::clear(odd);
#pragma unroll
  for (int first = 0; first < S::tiles; first += kTiles) {
    FragmentA tSrK[kTiles];
    load_zone_keys<S>(rows + 32 * first, lane, tSrK);
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) {
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n) {
        mma(mma_tile<S>(tSrS, n, 0), tSrK[k], q(_, n, first + k));
        mma(mma_tile<S>(odd, n, 0), tSrK[k + 1], q(_, n, first + k + 1));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < cute::size(tSrS); ++i) tSrS.data()[i] += odd.data()[i];
}

}  // namespace bitdecoding::decode
