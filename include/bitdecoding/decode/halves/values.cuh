// SPDX-License-Identifier: Apache-2.0
// An item's weights, and products of V's codes and fp16 weights, straight into O. m is lazy: it
// rises only when a score exceeds it by the slack, so most items don't rescale. p = 2^(s - m + 11),
// where m guards max s + e and e bounds log2 of the item's V scales: p * scale doesn't overflow
// fp16. Packed products carry the codes' powers of two (2^-24 and the field's position), a constant
// of the output row; zones come after the packed items and find O already true.
#pragma once

#include <type_traits>

#include "bitdecoding/decode/halves/fragments.cuh"
#include "bitdecoding/decode/values.cuh"

namespace bitdecoding::decode {

inline constexpr float kSlack = 4.f;  // a weight is at most 2^15

__device__ inline __half2 largest_value(const RowValues& values) {
  const uint4& bits = values.bits;
  return __hmax2(__hmax2(as_half2(bits.x), as_half2(bits.y)),
                 __hmax2(as_half2(bits.z), as_half2(bits.w)));
}
// An exponent e with every scale of the warp below 2^e, in [-14, 17].
__device__ inline int exponent_of(__half2 largest) {
  // Scales are not negative: their bits order like integers.
  const std::uint32_t bits = as_bits(largest);
  const std::uint32_t top = __reduce_max_sync(0xffffffffu, max(bits & 0xffffu, bits >> 16));
  return static_cast<int>(top >> 10) - 14;
}

// Raises m where this item's largest s + e exceeds it by the slack.
template <Halves S, int Blocks, class Scale, class Groups>
__device__ void update_maximum(const ScoreTensor<S, Blocks>& tSrS, const Scale& scale,
                               float exponent, Softmax<S>& softmax, Output<S, Groups>& output) {
  ColumnTensor<S> top;
  bool rises = false;
#pragma unroll
  for (int c = 0; c < S::lane_columns; ++c) {
    top(c) = largest_score<S, Blocks>(tSrS, scale, c) + exponent;
    rises |= top(c) > softmax.maximum(c) + kSlack;
  }
  if (!__any_sync(0xffffffffu, rises)) return;
#pragma unroll
  for (int c = 0; c < S::lane_columns; ++c) {
    float largest = top(c);
    for (int distance = 4; distance < 32; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    }
    const float raised = fmaxf(softmax.maximum(c), largest);
    const float factor = arch::exp2(softmax.maximum(c) - raised);
    softmax.maximum(c) = raised;
    softmax.sum(c) *= factor;
    output.rescale(c, factor);
  }
}

// Scores become p. `exponent`: of the item's V scales.
template <Halves S, int Blocks, class Scale, class Groups>
__device__ void weigh(ScoreTensor<S, Blocks>& tSrS, const Scale& scale, int exponent,
                      Softmax<S>& softmax, Output<S, Groups>& output) {
  update_maximum<S, Blocks>(tSrS, scale, static_cast<float>(exponent), softmax, output);
#pragma unroll
  for (int c = 0; c < S::lane_columns; ++c) {
    softmax.sum(c) +=
        exponentiate<S, Blocks>(tSrS, scale, c, kWeightExponent<S> - softmax.maximum(c));
  }
}

// p in accumulator order to weights in B operand order; weight(row, p): what becomes of p of the
// lane's token 8 * row + lane / 4.
template <Halves S, int Blocks, class Weight>
__device__ void make_operand(const ScoreTensor<S, Blocks>& tSrP, WeightTensor<S, Blocks>& tOrP,
                             const Weight& weight) {
#pragma unroll
  for (int row = 0; row < 2 * Blocks; ++row) {
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
      const float even = weight(row, tSrP(row % 2, 2 * n, row / 2));
      const float odd = weight(row, tSrP(row % 2, 2 * n + 1, row / 2));
      tOrP(row % 2, n, row / 2) = arch::transpose_8x8(as_bits(__floats2half2_rn(even, odd)));
    }
  }
}

template <Halves S, class Groups>
__device__ void make_true(Output<S, Groups>& output) {
  if (output.is_true) return;
  output.is_true = true;
  constexpr int kBits = S::page.v_bits;
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int f = 2 * (k % S::V::tiles_per_word) + row;
#pragma unroll
      for (int c = 0; c < S::lane_columns; ++c) {
        output.tOrO(row, c, k) *= kCodeFactor * position_factor<kBits>(f);
      }
    }
  }
}

// O^T (parts [first, first + Count) of the channels) += codes times weights, the parts in turns.
template <int Count, Halves S, class Groups, class Page>
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
          const FragmentA tOrV = v_halves<S::page.v_bits>(words[part].word[i], tile);
#pragma unroll
          for (int n = 0; n < S::n_tiles; ++n) {
            mma(mma_tile<S>(output.tOrO, n, column * S::V::tiles_per_word + tile), tOrV,
                weights(_, n, block));
          }
        }
      }
    }
  }
}

// One group, or two: scales join the weights before these become an operand.
template <Halves S, class Page>
__device__ void add_values(const Page& page, const WholeGroups<S::head_dim>& groups,
                           const ScoreTensor<S, kChunkBlocks>& tSrP, int /*exponent*/, int lane,
                           Output<S, WholeGroups<S::head_dim>>& output) {
  constexpr int kPartChannels = S::head_dim / S::V::v_parts;
  constexpr int kTurns = 2 / S::n_tiles;
  static_assert(S::V::v_parts % kTurns == 0);
  WeightTensor<S, kChunkBlocks> tOrP;
#pragma unroll
  for (int part = 0; part < S::V::v_parts; part += kTurns) {
    if (begins_group(part * kPartChannels, groups.v_group())) {
      const int group = group_of(part * kPartChannels, groups.v_group());
      const RowValues scales{page.v_token_vectors(group)(lane / 4, 0)};
      make_operand<S, kChunkBlocks>(tSrP, tOrP, [&](int row, float p) { return p * scales(row); });
    }
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

// Blocks: the zero-points' share, from all tokens' weights.
template <Halves S>
__device__ void add_zeros_of_weights(const WeightTensor<S, kChunkBlocks>& weights,
                                     ColumnTensor<S>& zero_sum) {
  constexpr int kColumns = S::lane_columns / S::n_tiles;
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
    auto sum = cute::make_tensor<float>(cute::Shape<_4>{});
    cute::clear(sum);
#pragma unroll
    for (int block = 0; block < kChunkBlocks; ++block) mma(sum, ones(), weights(_, n, block));
#pragma unroll
    for (int e = 0; e < kColumns; ++e) zero_sum(n * kColumns + e) += kZeroOfWeight<S> * sum(e);
  }
}

// Groups of channels, or blocks: weights become an operand once and are scaled for every group. A
// power of two 2^-shift, of the weights, is made up for by the scales: neither p nor p * scale
// overflows fp16, and tokens far below a sink keep their bits.
template <Halves S, class Groups, class Page>
  requires(!std::is_same_v<Groups, WholeGroups<S::head_dim>>)
__device__ void add_values(const Page& page, const Groups& groups,
                           const ScoreTensor<S, kChunkBlocks>& tSrP, int exponent, int lane,
                           Output<S, Groups>& output) {
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
      const int group = group_of(part * kPartChannels, groups.v_group());
      const PairValues scales(value_scales<S>(page, group, 2 * t).bits,
                              value_scales<S>(page, group, 2 * t + 1).bits);
#pragma unroll
      for (int i = 0; i < 2 * kChunkBlocks; ++i) {
        const std::uint32_t scale = multiply(scales.pair[i], up);
#pragma unroll
        for (int n = 0; n < S::n_tiles; ++n) {
          scaled(i % 2, n, i / 2) = multiply(tOrP(i % 2, n, i / 2), scale);
        }
      }
      if constexpr (S::page.has_blocks()) {
        add_zeros_of_weights<S>(scaled, output.zero_sum_of(part));
      }
    }
    add_parts<1, S>(page, part, scaled, lane, output);
  }
}

// O^T += V^T P^T of a chunk: scores become weights, and weigh in.
template <Halves S, class Groups, class Scale, class Page>
__device__ void add_chunk(const Page& page, const Groups& groups, const Scale& scale, int lane,
                          ScoreTensor<S, kChunkBlocks>& tSrS, Softmax<S>& softmax,
                          Output<S, Groups>& output) {
  constexpr int kPartChannels = S::head_dim / S::V::v_parts;
  __half2 largest = __float2half2_rn(0.f);
  for (int group = 0; group * groups.v_group() < S::head_dim; ++group) {
    largest = __hmax2(largest, largest_value(value_scales<S>(page, group, lane / 4)));
  }
  const int exponent = min(exponent_of(largest), 16);
  weigh<S, kChunkBlocks>(tSrS, scale, exponent, softmax, output);
  if constexpr (!S::page.has_blocks()) {
#pragma unroll
    for (int part = 0; part < S::V::v_parts; ++part) {
      if (!begins_group(part * kPartChannels, groups.v_group())) continue;
      const int group = group_of(part * kPartChannels, groups.v_group());
      const RowValues zeros{page.v_token_vectors(group)(lane / 4, 1)};
#pragma unroll
      for (int c = 0; c < S::lane_columns; ++c) {
        output.zero_sum_of(part)(c) += sum_of_zeros<S>(zeros, tSrS, c);
      }
    }
  }
  add_values<S>(page, groups, tSrS, exponent, lane, output);
}

// 16 fp16 tokens of a zone, those from `end` on hold anything and count for nothing.
template <Halves S, class Groups>
__device__ void add_zone(const std::uint8_t* rows, const ScoreScale<S, 1>& scale, int end, int lane,
                         ScoreTensor<S, 1>& tSrS, Softmax<S>& softmax, Output<S, Groups>& output) {
  make_true(output);
  weigh<S, 1>(tSrS, scale, 0, softmax, output);
  WeightTensor<S, 1> tOrP;
  make_operand<S, 1>(tSrS, tOrP, [](int, float p) { return p; });
  constexpr int kTiles = std::min(S::tiles, kZoneTiles);
#pragma unroll
  for (int first = 0; first < S::tiles; first += kTiles) {
    FragmentA tOrV[kTiles];
    load_zone_values<S>(rows + 32 * first, end, lane, tOrV);
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n)
        mma(mma_tile<S>(output.tOrO, n, first + k), tOrV[k], tOrP(_, n, 0));
    }
  }
}

}  // namespace bitdecoding::decode
