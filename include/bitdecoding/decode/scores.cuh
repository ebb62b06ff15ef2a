// SPDX-License-Identifier: Apache-2.0
// S^T = K Q^T of one item, as far as both kinds of products share it. A score in the log2 domain is
//   sum * factor + bias     factor, bias per query column and half of the chunk (tSrS stays raw)
// Per-channel K: factor and bias come with each group's Q'. Per-token K and token norms finish the
// scores in place; then factor is 1 and bias 0. Blocks of K: factor is the query's, bias 0.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "bitdecoding/decode/query.cuh"
#include "bitdecoding/format/quantizer.hpp"

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

// A lane's first row (token 8i + g) at or behind `token`.
__device__ inline int first_row(int token, int lane) { return (token - lane / 4 + 7) >> 3; }

// Eight fp16 of a lane's rows (token 8i + g), i = 2 * block + row.
struct RowValues {
  uint4 bits;

  __device__ float operator()(int i) const {
    const std::uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    const __half2 pair = as_half2(words[i / 2]);
    return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
  }
};

// The fp16 numbers 2^e of eight exponent bytes, which are 31 at most.
__device__ inline RowValues block_scales(uint2 exponents) {
  const __half2 zero = __float2half2_rn(0.f);
  // x * 0 + x turns infinity, the pattern of a NaN's byte, into NaN.
  const auto pair = [zero](std::uint32_t upper_bytes, int selector) {
    const __half2 scales = as_half2(__byte_perm(upper_bytes, 0, selector));
    return as_bits(__hfma2(scales, zero, scales));
  };
  const std::uint32_t low = exponents.x << 2, high = exponents.y << 2;
  return {{pair(low, 0x1404), pair(low, 0x3424), pair(high, 0x1404), pair(high, 0x3424)}};
}

__device__ inline RowValues larger(const RowValues& a, const RowValues& b) {
  const auto larger_pair = [](std::uint32_t x, std::uint32_t y) {
    return as_bits(__hmax2(as_half2(x), as_half2(y)));
  };
  return {{larger_pair(a.bits.x, b.bits.x), larger_pair(a.bits.y, b.bits.y),
           larger_pair(a.bits.z, b.bits.z), larger_pair(a.bits.w, b.bits.w)}};
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
    score_blocks<S>(page.k_units(0), kBlocks * half, kBlocks * (half + 1), lane, query, tSrS);
  }
}

// Norms multiply the finished score; the map becomes the identity.
template <class S, class Page, class Scale>
__device__ void apply_norms(const Page& page, int lane, ScoreTensor<S, kChunkBlocks>& tSrS,
                            const Scale& scale) {
  const RowValues norms{page.norm_vectors()(lane / 4)};
#pragma unroll
  for (int row = 0; row < 2 * kChunkBlocks; ++row) {
    const int group = Scale::at(row / 2);
#pragma unroll
    for (int c = 0; c < S::lane_columns; ++c) {
      float& s = tSrS(row % 2, c, row / 2);
      s = (s * scale.factor[group](c) + scale.bias[group](c)) * norms(row);
    }
  }
}

// K of 16 fp16 tokens of a zone as A, Tiles tiles of channels. `rows`: in shared memory,
// zone_row_bytes apart.
template <class S, int Tiles>
__device__ void load_zone_keys(const std::uint8_t* rows, int lane, FragmentA (&tSrK)[Tiles]) {
#pragma unroll
  for (int k = 0; k < Tiles; ++k) {
    const std::uint8_t* row =
        rows + lane % 16 * zone_row_bytes(S::head_dim) + 32 * k + lane / 16 * 16;
    auto& a = tSrK[k].a;
    cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(row), a[0], a[1], a[2],
                                  a[3]);
  }
  __syncwarp();  // all rows are under way before the first MMA
}

// Tokens outside [begin, end) of an item get -inf, whatever was there.
template <class S, int Blocks>
__device__ void mask_scores(int begin, int end, int lane, ScoreTensor<S, Blocks>& tSrS) {
  const int first = first_row(begin, lane), behind = first_row(end, lane);
#pragma unroll
  for (int row = 0; row < 2 * Blocks; ++row) {
    if (row >= first && row < behind) continue;
#pragma unroll
    for (int c = 0; c < S::lane_columns; ++c) tSrS(row % 2, c, row / 2) = -INFINITY;
  }
}

}  // namespace bitdecoding::decode
