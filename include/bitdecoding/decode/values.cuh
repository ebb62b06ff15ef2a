// SPDX-License-Identifier: Apache-2.0
// O^T += V^T P^T of one item. Per-token V scales multiply the weights after they have become B
// operands, once per channel group; zero-points add sum(p * zero), one number per query and group.
// Packed products carry the codes' powers of two (2^-24 and the field's position), a constant of
// the output row; zones come after the packed items and find O already true.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "bitdecoding/decode/online_softmax.cuh"

namespace bitdecoding::decode {

template <class S>
struct Output {
  OutputTensor<S> tOrO;
  // sum(p * zero) of the channel group that begins at a part of the channels.
  ColumnTensor<S> zero_sum[S::V::v_parts];
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
    for (int part = 0; part < S::V::v_parts; ++part) zero_sum[part](e, n) *= factor;
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

  // Tokens before `begin` become 0, whatever they were.
  __device__ void mask(int begin, int t) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = 8 * i + 2 * t;
      pair[i] &= (token >= begin ? 0x0000ffffu : 0u) | (token + 1 >= begin ? 0xffff0000u : 0u);
    }
  }
};

// An exponent e with every V scale of the chunk's tokens from `begin` on at most 2^e, in [-14, 16].
template <class S, class Groups, class Page>
__device__ float scale_exponent(const Page& page, const Groups& groups, int begin, int lane) {
  __half2 largest = __float2half2_rn(0.f);
  for (int group = 0; group * groups.v_group() < S::head_dim; ++group) {
    uint4 row = page.v_token_vectors(group)(lane / 4, 0);  // tokens 8i + g, i = 0..7
    if (begin > 0) {
      const auto keep = [&](int i) {
        return (8 * i + lane / 4 >= begin ? 0x0000ffffu : 0u) |
               (8 * i + 8 + lane / 4 >= begin ? 0xffff0000u : 0u);
      };
      row = {row.x & keep(0), row.y & keep(2), row.z & keep(4), row.w & keep(6)};
    }
    largest = __hmax2(__hmax2(largest, __hmax2(as_half2(row.x), as_half2(row.y))),
                      __hmax2(as_half2(row.z), as_half2(row.w)));
  }
  // Scales are not negative: their bits order like integers.
  const std::uint32_t bits = as_bits(largest);
  const std::uint32_t top = __reduce_max_sync(0xffffffffu, max(bits & 0xffffu, bits >> 16));
  return static_cast<float>(min(static_cast<int>(top >> 10) - 14, 16));
}

// O^T (a part of the channels) += codes times weights.
template <class S, class Page>
__device__ void add_part(const Page& page, int part, const WeightTensor<S, kChunkBlocks>& weights,
                         int lane, Output<S>& output) {
#pragma unroll
  for (int unit = 0; unit < S::V::v_units; ++unit) {
    const auto words = page.v_units(0)(lane, unit, part);
#pragma unroll
    for (int i = 0; i < S::V::v_unit_words; ++i) {
      const int word = unit * S::V::v_unit_words + i;
      const int block = word / S::V::v_part_words;
      const int column = part * S::V::v_part_words + word % S::V::v_part_words;
#pragma unroll
      for (int tile = 0; tile < S::V::tiles_per_word; ++tile) {
        const FragmentA tOrV = v_fragment<S::page.v_bits>(words.word[i], tile);
#pragma unroll
        for (int n = 0; n < S::n_tiles; ++n) {
          mma(output.tOrO(_, n, column * S::V::tiles_per_word + tile), tOrV, weights(_, n, block));
        }
      }
    }
  }
}

// Weights carry 2^-shift, scales make up for it. Tokens before `begin` count for nothing.
template <class S, class Groups, class Page>
__device__ void add_values(const Page& page, const Groups& groups,
                           const WeightTensor<S, kChunkBlocks>& tOrP, float shift, int begin,
                           int lane, Output<S>& output) {
  constexpr int kPartChannels = S::head_dim / S::V::v_parts;
  const int t = lane % 4;
  const float unshift = __int_as_float((static_cast<int>(shift) + 127) << 23);
  const std::uint32_t unshift_pair = as_bits(__float2half2_rn(unshift));
  auto scaled = cute::make_tensor_like(tOrP);
#pragma unroll
  for (int part = 0; part < S::V::v_parts; ++part) {
    if (begins_group(part * kPartChannels, groups.v_group())) {
      const auto vectors = page.v_token_vectors(group_of(part * kPartChannels, groups.v_group()));
      PairValues scales(vectors(2 * t, 0), vectors(2 * t + 1, 0));
      PairValues zeros(vectors(2 * t, 1), vectors(2 * t + 1, 1));
      if (begin > 0) {  // a weight of 0 doesn't undo a NaN
        scales.mask(begin, t);
        zeros.mask(begin, t);
      }
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n) {
        auto sum = cute::make_tensor<float>(cute::Shape<_4>{});
        cute::clear(sum);
#pragma unroll
        for (int block = 0; block < kChunkBlocks; ++block) {
          const std::uint32_t z0 = zeros.pair[2 * block], z1 = zeros.pair[2 * block + 1];
          mma(sum, {z0, z0, z1, z1}, tOrP(_, n, block));
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            scaled(u, n, block) =
                multiply(tOrP(u, n, block), multiply(scales.pair[2 * block + u], unshift_pair));
          }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) output.zero_sum[part](e, n) += sum(e) * unshift;
      }
    }
    add_part<S>(page, part, scaled, lane, output);
  }
}

// 16 fp16 tokens of a zone, those from `end` on hold anything and count for nothing.
template <class S>
__device__ void add_zone(const std::uint8_t* rows, const WeightTensor<S, 1>& tOrP, int end,
                         int lane, Output<S>& output) {
  const int t = lane % 4;
  const auto keep = [&](int token) {  // of a pair of tokens
    return (token < end ? 0x0000ffffu : 0u) | (token + 1 < end ? 0xffff0000u : 0u);
  };
  const std::uint32_t low = keep(2 * t), high = keep(2 * t + 8);
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
    const std::uint8_t* row = rows + (lane / 16 * 8 + lane % 8) * zone_row_bytes(S::head_dim) +
                              32 * k + lane / 8 % 2 * 16;
    FragmentA a;
    cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(row), a.a[0], a.a[1],
                                  a.a[2], a.a[3]);
    a = {a.a[0] & low, a.a[1] & low, a.a[2] & high, a.a[3] & high};
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) mma(output.tOrO(_, n, k), a, tOrP(_, n, 0));
  }
}

}  // namespace bitdecoding::decode
