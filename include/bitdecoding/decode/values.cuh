// SPDX-License-Identifier: Apache-2.0
// O^T += V^T P^T of one item. Per-token V scales multiply the weights; zero-points add
// sum(p * zero), one number per query and group.
// Packed products carry the codes' powers of two (2^-24 and the field's position), a constant of
// the output row; zones come after the packed items and find O already true.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "bitdecoding/decode/groups.hpp"
#include "bitdecoding/decode/online_softmax.cuh"

namespace bitdecoding::decode {

template <class S, class Groups>
struct Output {
  static constexpr int kZeroSums =
      Groups::kMostValueGroups < S::V::v_parts ? Groups::kMostValueGroups : S::V::v_parts;

  OutputTensor<S> tOrO;
  // sum(p * zero) of the channel group that begins at a part of the channels: this lane's rows.
  ColumnTensor<S> zero_sum[kZeroSums];
  bool is_true = false;  // tOrO no longer carries the codes' powers of two

  __device__ void reset() {
    cute::clear(tOrO);
    for (auto& sum : zero_sum) cute::clear(sum);
    is_true = false;
  }
  __device__ void rescale(int e, int n, float factor) {
#pragma unroll
    for (int k = 0; k < S::tiles; ++k) {
      tOrO(e, n, k) *= factor;
      tOrO(e + 2, n, k) *= factor;
    }
#pragma unroll
    for (auto& sum : zero_sum) sum(e, n) *= factor;
  }
  __device__ void make_true() {
    if (is_true) return;
    is_true = true;
    constexpr int kBits = S::page.v_bits;
#pragma unroll
    for (int k = 0; k < S::tiles; ++k) {
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int f = 2 * (k % S::V::tiles_per_word) + e / 2;
          tOrO(e, n, k) *= kCodeFactor * position_factor<kBits>(f);
        }
      }
    }
  }
};

// Scales and zero-points of tokens before `begin` become 0 in shared memory, whatever they were: a
// weight of 0 doesn't undo a NaN.
template <class S, class Groups, class Page>
__device__ void clear_values(const Page& page, const Groups& groups, int begin, int lane) {
  const int row = lane / 4, first = first_row(begin, lane);
  for (int group = 0; group * groups.v_group() < S::head_dim; ++group) {
    for (int which = lane % 4; which < 2; which += 4) {
      uint4& values = page.v_token_vectors(group)(row, which);
      const auto keep = [&](int i) {
        return (i >= first ? 0x0000ffffu : 0u) | (i + 1 >= first ? 0xffff0000u : 0u);
      };
      values = {values.x & keep(0), values.y & keep(2), values.z & keep(4), values.w & keep(6)};
    }
  }
  __syncwarp();
}

// An exponent e with every V scale of the chunk at most 2^e, in [-14, 16].
template <class S, class Groups, class Page>
__device__ int scale_exponent(const Page& page, const Groups& groups, int lane) {
  __half2 largest = __float2half2_rn(0.f);
  for (int group = 0; group * groups.v_group() < S::head_dim; ++group) {
    const uint4 row = page.v_token_vectors(group)(lane / 4, 0);
    largest = __hmax2(__hmax2(largest, __hmax2(as_half2(row.x), as_half2(row.y))),
                      __hmax2(as_half2(row.z), as_half2(row.w)));
  }
  // Scales are not negative: their bits order like integers.
  const std::uint32_t bits = as_bits(largest);
  const std::uint32_t top = __reduce_max_sync(0xffffffffu, max(bits & 0xffffu, bits >> 16));
  return min(static_cast<int>(top >> 10) - 14, 16);
}

// sum(p * zero) of every group of channels.
template <class S, class Groups, class Page>
__device__ void add_zeros(const Page& page, const Groups& groups,
                          const ScoreTensor<S, kChunkBlocks>& tSrP, int lane,
                          Output<S, Groups>& output) {
  constexpr int kPartChannels = S::head_dim / S::V::v_parts;
#pragma unroll
  for (int part = 0; part < Output<S, Groups>::kZeroSums; ++part) {
    if (!begins_group(part * kPartChannels, groups.v_group())) continue;
    const int group = group_of(part * kPartChannels, groups.v_group());
    const RowValues zeros{page.v_token_vectors(group)(lane / 4, 1)};
#pragma unroll
    for (int row = 0; row < 2 * kChunkBlocks; ++row) {
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          output.zero_sum[part](e, n) += tSrP(2 * (row % 2) + e, n, row / 2) * zeros(row);
        }
      }
    }
  }
}

// O^T (parts [first, first + Count) of the channels) += codes times weights, the parts in turns.
template <int Count, class S, class Groups, class Page>
__device__ void add_parts(const Page& page, int first, const WeightTensor<S, kChunkBlocks>& weights,
                          int lane, Output<S, Groups>& output) {
  const auto units = page.v_units(0);
#pragma unroll
  for (int unit = 0; unit < S::V::v_units; ++unit) {
    std::remove_cvref_t<decltype(units(0, 0, 0))> words[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) words[i] = units(lane, unit, first + i);
#pragma unroll
    for (int i = 0; i < S::V::v_unit_words; ++i) {
      const int word = unit * S::V::v_unit_words + i;
      const int block = word / S::V::v_part_words;
#pragma unroll
      for (int tile = 0; tile < S::V::tiles_per_word; ++tile) {
#pragma unroll
        for (int part = 0; part < Count; ++part) {
          const int column = (first + part) * S::V::v_part_words + word % S::V::v_part_words;
          const FragmentA tOrV = v_fragment<S::page.v_bits>(words[part].word[i], tile);
#pragma unroll
          for (int n = 0; n < S::n_tiles; ++n) {
            mma(output.tOrO(_, n, column * S::V::tiles_per_word + tile), tOrV,
                weights(_, n, block));
          }
        }
      }
    }
  }
}

// One group: scales join the weights before these become an operand.
template <class S, class Page>
__device__ void add_values(const Page& page, const WholeGroups<S::head_dim>&,
                           const ScoreTensor<S, kChunkBlocks>& tSrP, int /*exponent*/, int lane,
                           Output<S, WholeGroups<S::head_dim>>& output) {
  const RowValues scales{page.v_token_vectors(0)(lane / 4, 0)};
  WeightTensor<S, kChunkBlocks> tOrP;
  make_operand<S, kChunkBlocks>(tSrP, tOrP, [&](int row, float p) { return p * scales(row); });
  constexpr int kTurns = 2 / S::n_tiles;
  static_assert(S::V::v_parts % kTurns == 0);
#pragma unroll
  for (int part = 0; part < S::V::v_parts; part += kTurns) {
    add_parts<kTurns, S>(page, part, tOrP, lane, output);
  }
}

// The fp16 of tokens (16 * block + 2t, + 1) + 8u as pairs, i = 2 * block + u: B operand order.
struct PairValues {
  std::uint32_t pair[8];

  // The rows g = 2t and g = 2t + 1 of a lane-order plane.
  __device__ PairValues(const uint4& even, const uint4& odd) {
    const std::uint32_t a[4] = {even.x, even.y, even.z, even.w};
    const std::uint32_t b[4] = {odd.x, odd.y, odd.z, odd.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      pair[i] = __byte_perm(a[i / 2], b[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
    }
  }
};

// Small scales are lifted wholly; of large ones the weights take one half, so that weights far
// below a sink don't become subnormal.
__device__ inline int weight_shift(int exponent) {
  return exponent < 0 ? -exponent : -(exponent >> 1);
}

// Groups of channels: weights become an operand once and are scaled for every group. A power of two
// 2^-shift, of the weights, is made up for by the scales: neither p nor p * scale overflows fp16,
// and tokens far below a sink keep their bits.
template <class S, class Page>
__device__ void add_values(const Page& page, const AnyGroups& groups,
                           const ScoreTensor<S, kChunkBlocks>& tSrP, int exponent, int lane,
                           Output<S, AnyGroups>& output) {
  constexpr int kPartChannels = S::head_dim / S::V::v_parts;
  const int t = lane % 4;
  const int shift = weight_shift(exponent);
  const float down = power_of_two(-shift);
  const std::uint32_t up = as_bits(__float2half2_rn(power_of_two(shift)));
  WeightTensor<S, kChunkBlocks> tOrP, scaled;
  make_operand<S, kChunkBlocks>(tSrP, tOrP, [&](int, float p) { return p * down; });
#pragma unroll
  for (int part = 0; part < S::V::v_parts; ++part) {
    if (begins_group(part * kPartChannels, groups.v_group())) {
      const auto vectors = page.v_token_vectors(group_of(part * kPartChannels, groups.v_group()));
      const PairValues scales(vectors(2 * t, 0), vectors(2 * t + 1, 0));
#pragma unroll
      for (int i = 0; i < 2 * kChunkBlocks; ++i) {
        const std::uint32_t scale = multiply(scales.pair[i], up);
#pragma unroll
        for (int n = 0; n < S::n_tiles; ++n) {
          scaled(i % 2, n, i / 2) = multiply(tOrP(i % 2, n, i / 2), scale);
        }
      }
    }
    add_parts<1, S>(page, part, scaled, lane, output);
  }
}

// 16 fp16 tokens of a zone, those from `end` on hold anything and count for nothing.
template <class S, class Groups>
__device__ void add_zone(const std::uint8_t* rows, const ScoreTensor<S, 1>& tSrP, int end, int lane,
                         Output<S, Groups>& output) {
  WeightTensor<S, 1> tOrP;
  make_operand<S, 1>(tSrP, tOrP, [](int, float p) { return p; });
  FragmentA tOrV[S::tiles];
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
    const std::uint8_t* row = rows + (lane / 16 * 8 + lane % 8) * zone_row_bytes(S::head_dim) +
                              32 * k + lane / 8 % 2 * 16;
    auto& a = tOrV[k].a;
    cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(row), a[0], a[1], a[2],
                                  a[3]);
  }
  if (end < kZoneTokens) {
    const int t = lane % 4;
    const auto keep = [&](int token) {  // of a pair of tokens
      return (token < end ? 0x0000ffffu : 0u) | (token + 1 < end ? 0xffff0000u : 0u);
    };
    const std::uint32_t low = keep(2 * t), high = keep(2 * t + 8);
#pragma unroll
    for (FragmentA& v : tOrV) v = {v.a[0] & low, v.a[1] & low, v.a[2] & high, v.a[3] & high};
  }
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) mma(output.tOrO(_, n, k), tOrV[k], tOrP(_, n, 0));
  }
}

}  // namespace bitdecoding::decode
