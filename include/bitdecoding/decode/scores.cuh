// SPDX-License-Identifier: Apache-2.0
// S^T = K Q^T of one item, in accumulator order. A score in the log2 domain is
//   acc * factor + bias     factor, bias per query column and half of the chunk (tSrS stays raw)
// Per-channel K: factor and bias come with each group's Q'. Per-token K and token norms finish the
// scores in place; then factor is 1 and bias 0.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "bitdecoding/decode/query.cuh"

namespace bitdecoding::decode {

// Affine maps of the channel-axis K groups of a chunk: one, or one for each half (32 tokens).
template <class S, int Count>
struct ScoreScale {
  ColumnTensor<S> factor[Count];
  ColumnTensor<S> bias[Count];

  // Of a 16-token block.
  static constexpr int at(int block) { return Count == 1 ? 0 : block / 2; }

  __device__ void set_identity() {
    for (int group = 0; group < Count; ++group) {
      cute::fill(factor[group], 1.f);
      cute::clear(bias[group]);
    }
  }
};

// A lane's first accumulator row (token 8i + g) at or behind `token`.
__device__ inline int first_row(int token, int lane) { return (token - lane / 4 + 7) >> 3; }

// Eight fp16 of a lane's accumulator rows (token 8i + g), i = 2 * block + u.
struct RowValues {
  uint4 bits;

  __device__ float operator()(int i) const {
    const std::uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    const __half2 pair = as_half2(words[i / 2]);
    return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
  }
};

// acc (block) += codes of `Count` 16-token blocks times Q', channel tiles [first, last).
template <int Count, class S, class Units>
__device__ void score_few_blocks(const Units& units, int first_block, int lane,
                                 const QueryTensor<S>& scaled, int first_tile, int last_tile,
                                 ScoreTensor<S, kChunkBlocks>& acc) {
  constexpr int kTiles = S::K::tiles_per_word;
#pragma unroll
  for (int unit = 0; unit < S::K::k_units; ++unit) {
    if ((unit + 1) * S::K::k_unit_words * kTiles <= first_tile) continue;
    if (unit * S::K::k_unit_words * kTiles >= last_tile) continue;
    std::remove_cvref_t<decltype(units(0, 0, 0))> words[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) words[i] = units(lane, unit, first_block + i);
    __syncwarp();  // all words are under way before the first MMA
#pragma unroll
    for (int word = 0; word < S::K::k_unit_words; ++word) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int k = (unit * S::K::k_unit_words + word) * kTiles + tile;
        if (k < first_tile || k >= last_tile) continue;
#pragma unroll
        for (int i = 0; i < Count; ++i) {
          const FragmentA tSrK = k_fragment<S::page.k_bits>(words[i].word[word], tile);
#pragma unroll
          for (int n = 0; n < S::n_tiles; ++n) {
            mma(acc(_, n, first_block + i), tSrK, scaled(_, n, k));
          }
        }
      }
    }
  }
}

// The same of blocks [first, last): four MMAs in turns, so that none waits for the one before.
template <class S, class Units>
__device__ void score_blocks(const Units& units, int first_block, int last_block, int lane,
                             const QueryTensor<S>& scaled, int first_tile, int last_tile,
                             ScoreTensor<S, kChunkBlocks>& acc) {
  constexpr int kTurns = 4 / S::n_tiles;
#pragma unroll
  for (int block = first_block; block < last_block; block += kTurns) {
    if (last_block - block >= kTurns) {
      score_few_blocks<kTurns, S>(units, block, lane, scaled, first_tile, last_tile, acc);
    } else {
      score_few_blocks<2, S>(units, block, lane, scaled, first_tile, last_tile, acc);
    }
  }
}

// Per-channel K: a chunk is one group, part of one, or two of 32 tokens.
template <class S, class Groups, class Page>
__device__ void score_channel_axis(const Page& page, const Groups& groups, Query<S>& query,
                                   bool new_group, int lane, ScoreTensor<S, kChunkBlocks>& tSrS,
                                   ScoreScale<S, Groups::kMostChunkGroups>& scale) {
  constexpr int kLast = Groups::kMostChunkGroups - 1;
  constexpr int kBlocks = kChunkBlocks / Groups::kMostChunkGroups;
#pragma unroll
  for (int half = 0; half < Groups::kMostChunkGroups; ++half) {
    if (half == 0 ? new_group : groups.chunk_groups() == 2) {
      const int group = half == 0 ? 0 : kLast;
      apply_channel_group<S>(query, page.k_group_vectors(half), lane, scale.factor[group],
                             scale.bias[group]);
      if (half == 0) {
        scale.factor[kLast] = scale.factor[0];
        scale.bias[kLast] = scale.bias[0];
      }
    }
    score_blocks<S>(page.k_units(0), kBlocks * half, kBlocks * (half + 1), lane, query.scaled, 0,
                    S::tiles, tSrS);
  }
}

// Per-token K: scale and zero act on the rows; groups of channels have accumulators of their own.
// `sums` (group of 32 channels): the column sums of q over the channels of each 32.
template <class S, class Groups, class Page>
__device__ void score_token_axis(const Page& page, const Groups& groups, const Query<S>& query,
                                 const ColumnTensor<S> (&sums)[S::tiles / 2], int lane,
                                 ScoreTensor<S, kChunkBlocks>& tSrS) {
  auto partial = cute::make_tensor_like(tSrS);
  auto zero_weight = cute::make_tensor_like(query.scale);
  cute::clear(partial);
  cute::clear(zero_weight);
#pragma unroll
  for (int span = 0; span < S::tiles / 2; ++span) {
    score_blocks<S>(page.k_units(0), 0, kChunkBlocks, lane, query.scaled, 2 * span, 2 * span + 2,
                    partial);
#pragma unroll
    for (int i = 0; i < cute::size(zero_weight); ++i) zero_weight(i) += sums[span](i);
    if (!begins_group(32 * span + 32, groups.k_token_group())) continue;
    const auto vectors = page.k_token_vectors(group_of(32 * span, groups.k_token_group()));
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
template <class S, class Page, class Scale>
__device__ void apply_norms(const Page& page, int lane, ScoreTensor<S, kChunkBlocks>& tSrS,
                            const Scale& scale) {
  const RowValues norms{page.norm_vectors()(lane / 4)};
#pragma unroll
  for (int block = 0; block < kChunkBlocks; ++block) {
    const int group = Scale::at(block);
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& s = tSrS(e, n, block);
        s = (s * scale.factor[group](e % 2, n) + scale.bias[group](e % 2, n)) *
            norms(2 * block + e / 2);
      }
    }
  }
}

// 16 fp16 tokens of a zone. `rows`: K rows in shared memory, zone_row_bytes apart.
template <class S>
__device__ void score_zone(const std::uint8_t* rows, const Query<S>& query, int lane,
                           ScoreTensor<S, 1>& tSrS) {
  FragmentA tSrK[S::tiles];
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
    const std::uint8_t* row =
        rows + lane % 16 * zone_row_bytes(S::head_dim) + 32 * k + lane / 16 * 16;
    auto& a = tSrK[k].a;
    cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(row), a[0], a[1], a[2],
                                  a[3]);
  }
  __syncwarp();  // all rows are under way before the first MMA
  auto odd = cute::make_tensor_like(tSrS);
  cute::clear(odd);
#pragma unroll
  for (int k = 0; k < S::tiles; k += 2) {
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
      mma(tSrS(_, n, 0), tSrK[k], query.q(_, n, k));
      mma(odd(_, n, 0), tSrK[k + 1], query.q(_, n, k + 1));
    }
  }
#pragma unroll
  for (int i = 0; i < cute::size(tSrS); ++i) tSrS(i) += odd(i);
}

// Tokens outside [begin, end) of an item get -inf, whatever was there.
template <class S, int Blocks>
__device__ void mask_scores(int begin, int end, int lane, ScoreTensor<S, Blocks>& tSrS) {
  const int first = first_row(begin, lane), behind = first_row(end, lane);
#pragma unroll
  for (int row = 0; row < 2 * Blocks; ++row) {
    if (row >= first && row < behind) continue;
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
      tSrS(2 * (row % 2), n, row / 2) = -INFINITY;
      tSrS(2 * (row % 2) + 1, n, row / 2) = -INFINITY;
    }
  }
}

}  // namespace bitdecoding::decode
