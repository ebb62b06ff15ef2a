// SPDX-License-Identifier: Apache-2.0
// O^T += V^T P^T of one item, as far as both kinds of products share it. Per-token V scales
// multiply the weights; zero-points add sum(p * zero), one number per query and group.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "bitdecoding/decode/groups.hpp"
#include "bitdecoding/decode/online_softmax.cuh"

namespace bitdecoding::decode {

// Of the rows (token 8i + row) of a chunk, for a group of channels.
template <class S, class Page>
__device__ RowValues value_scales(const Page& page, int group, int row) {
  if constexpr (S::page.has_blocks()) {
    return block_scales(page.v_exponent_vectors(group)(row));
  } else {
    return {page.v_token_vectors(group)(row, 0)};
  }
}

// Zero-points of blocks are -block_middle times the scales, so their sum is that of the weights p *
// scale, as an MMA of ones has it in all rows, rounded like those that meet the codes. A zero sum is
// one of eight lanes' rows: an eighth.
template <class S>
inline constexpr float kZeroOfWeight = -format::block_middle(S::page.v_bits) / 8;

template <class S, class Groups>
struct Output {
  static constexpr int kZeroSums =
      Groups::kMostValueGroups < S::V::v_parts ? Groups::kMostValueGroups : S::V::v_parts;

  OutputTensor<S> tOrO;
  ColumnTensor<S> zero_sum[kZeroSums];  // see zero_sum_of
  bool is_true = false;                 // halves: tOrO no longer carries the codes' powers of two

  // sum(p * zero) of the channel group that begins at a part of the channels: this lane's rows.
  __device__ ColumnTensor<S>& zero_sum_of(int part) {
    return zero_sum[part * kZeroSums / S::V::v_parts];
  }

  __device__ void reset() {
    cute::clear(tOrO);
    for (auto& sum : zero_sum) cute::clear(sum);
    is_true = false;
  }
  __device__ void rescale(int c, float factor) {
#pragma unroll
    for (int k = 0; k < S::tiles; ++k) {
      tOrO(0, c, k) *= factor;
      tOrO(1, c, k) *= factor;
    }
#pragma unroll
    for (auto& sum : zero_sum) sum(c) *= factor;
  }
};

// Scales and zero-points of tokens before `begin` become 0 in shared memory, whatever they were: a
// weight of 0 doesn't undo a NaN.
template <class S, class Groups, class Page>
__device__ void clear_values(const Page& page, const Groups& groups, int begin, int lane) {
  const int row = lane / 4, first = first_row(begin, lane);
  for (int group = 0; group * groups.v_group() < S::head_dim; ++group) {
    if constexpr (S::page.has_blocks()) {
      if (lane % 4 != 0) continue;
      uint2& exponents = page.v_exponent_vectors(group)(row);
      const auto keep = [&](int i) {
        const int before = min(max(first - i, 0), 4);  // of four bytes
        return before < 4 ? ~0u << 8 * before : 0u;
      };
      exponents = {exponents.x & keep(0), exponents.y & keep(4)};
    } else {
      for (int which = lane % 4; which < 2; which += 4) {
        uint4& values = page.v_token_vectors(group)(row, which);
        const auto keep = [&](int i) {
          return (i >= first ? 0x0000ffffu : 0u) | (i + 1 >= first ? 0xffff0000u : 0u);
        };
        values = {values.x & keep(0), values.y & keep(2), values.z & keep(4), values.w & keep(6)};
      }
    }
  }
  __syncwarp();
}

template <class S>
__device__ float sum_of_zeros(const RowValues& zeros, const ScoreTensor<S, kChunkBlocks>& tSrP,
                              int c) {
  float sum = 0.f;
#pragma unroll
  for (int row = 0; row < 2 * kChunkBlocks; ++row) sum += tSrP(row % 2, c, row / 2) * zeros(row);
  return sum;
}

// V^T of 16 fp16 tokens as A, Tiles tiles of channels; tokens from `end` on hold anything and become
// 0.
template <class S, int Tiles>
__device__ void load_zone_values(const std::uint8_t* rows, int end, int lane,
                                 FragmentA (&tOrV)[Tiles]) {
#pragma unroll
  for (int k = 0; k < Tiles; ++k) {
    const std::uint8_t* row = rows + (lane / 16 * 8 + lane % 8) * zone_row_bytes(S::head_dim) +
                              32 * k + lane / 8 % 2 * 16;
    auto& a = tOrV[k].a;
    cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(row), a[0], a[1], a[2],
                                  a[3]);
  }
  if (end == kZoneTokens) return;
  const int t = lane % 4;
  const auto keep = [&](int token) {  // of a pair of tokens
    return (token < end ? 0x0000ffffu : 0u) | (token + 1 < end ? 0xffff0000u : 0u);
  };
  const std::uint32_t low = keep(2 * t), high = keep(2 * t + 8);
#pragma unroll
  for (FragmentA& v : tOrV) v = {v.a[0] & low, v.a[1] & low, v.a[2] & high, v.a[3] & high};
}

}  // namespace bitdecoding::decode
