// SPDX-License-Identifier: Apache-2.0
// An item's weights, and products of V's codes and their bytes. P' = p * scale is 16-bit fixed
// point relative to the largest of its chunk: a token that scores high but has small values, as
// attention sinks do, takes no bits from the others. Sums are integers of one chunk; O takes them
// up in fp32, by a factor that knows the fields' position, the fixed point and the chunk's weight
// 2^(top - m), where top is the chunk's largest score and p = 2^(s - top).
#pragma once

#include "bitdecoding/decode/bytes/fragments.cuh"
#include "bitdecoding/decode/values.cuh"

namespace bitdecoding::decode {

// Scores become p; m rises to `top` where that is larger. Returns the item's weight 2^(top - m).
template <Bytes S, int Blocks, class Scale, class Groups>
__device__ float weigh(ScoreTensor<S, Blocks>& tSrS, const Scale& scale, Softmax<S>& softmax,
                       Output<S, Groups>& output) {
  float top = fmaxf(largest_score<S, Blocks>(tSrS, scale, 0), kMaximumFloor);
  for (int distance = 4; distance < 32; distance *= 2) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
  }
  if (__any_sync(0xffffffffu, top > softmax.maximum(0))) {
    const float raised = fmaxf(softmax.maximum(0), top);
    const float factor = arch::exp2(softmax.maximum(0) - raised);
    softmax.maximum(0) = raised;
    softmax.sum(0) *= factor;
    output.rescale(0, factor);
  }
  const float weight = arch::exp2(top - softmax.maximum(0));
  softmax.sum(0) += weight * exponentiate<S, Blocks>(tSrS, scale, 0, -top);
  return weight;
}

// The scale of every row that is the largest of its channel groups.
template <Bytes S, class Groups, class Page>
__device__ RowValues largest_scales(const Page& page, const Groups& groups, int lane) {
  RowValues largest = value_scales<S>(page, 0, lane / 4);
  for (int group = 1; group * groups.v_group() < S::head_dim; ++group) {
    largest = larger(largest, value_scales<S>(page, group, lane / 4));
  }
  return largest;
}

// The largest P' of the chunk; not so small that what is relative to it overflows.
template <Bytes S>
__device__ float largest_weight(const RowValues& scales, const ScoreTensor<S, kChunkBlocks>& tSrP) {
  float largest = 0x1p-40f;
#pragma unroll
  for (int row = 0; row < 2 * kChunkBlocks; ++row) {
    largest = fmaxf(largest, tSrP(row % 2, 0, row / 2) * scales(row));
  }
  for (int distance = 4; distance < 32; distance *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  return largest;
}

// P' of a channel group as B operand: nearest integers of p * scale, which are below 2^16.
template <Bytes S>
__device__ void make_weights(const RowValues& scales, const ScoreTensor<S, kChunkBlocks>& tSrP,
                             WeightBytes& tOrP) {
#pragma unroll
  for (int block = 0; block < kChunkBlocks; ++block) {
    // The sum with 2^23 has the nearest integer in its lowest bits.
    const auto fixed = [&](int row) {
      return __float_as_uint(__fmaf_rn(tSrP(row, 0, block), scales(2 * block + row), 0x1p23f));
    };
    // Upper bytes of the tokens g and g + 8, then lower bytes: MMA columns 2t and 2t + 1.
    const std::uint32_t bytes = __byte_perm(fixed(0), fixed(1), 0x4051);
    tOrP(block % 2, block / 2) = arch::transpose_8x8(bytes);
  }
}

// Of a column's P', all tokens.
__device__ inline float sum_of_weights(const WeightBytes& tOrP) {
  constexpr std::uint32_t kOnes = 0x01010101u;
  ByteSums sums;
  cute::clear(sums);
#pragma unroll
  for (int pair = 0; pair < kChunkBlocks / 2; ++pair) {
    mma_unsigned(sums, {kOnes, kOnes, kOnes, kOnes}, tOrP(_, pair));
  }
  return static_cast<float>(static_cast<int>(sums(0) * 256 + sums(1)));
}

// NaN where one of a lane's rows has a NaN for a scale, else 0: as an integer a P' loses it.
__device__ inline float lost_nan(const RowValues& scales) {
  const __half2 zero = __float2half2_rn(0.f);
  __half2 sum = zero;
  for (const std::uint32_t word : {scales.bits.x, scales.bits.y, scales.bits.z, scales.bits.w}) {
    sum = __hfma2(as_half2(word), zero, sum);
  }
  return __low2float(sum) + __high2float(sum);
}

// O^T (a part of the channels) += factor * codes times P'.
template <Bytes S, class Page, class Groups>
__device__ void add_part(const Page& page, int part, const WeightBytes& tOrP, float factor,
                         int lane, Output<S, Groups>& output) {
  constexpr int kUnitWords = S::V::v_unit_words, kWords = S::V::v_part_words;
  constexpr float kOdd = 1.f / kOddField<S::page.v_bits>;
  const auto units = page.v_units(0);
  std::uint32_t words[kChunkBlocks * kWords];
#pragma unroll
  for (int unit = 0; unit < S::V::v_units; ++unit) {
    const auto piece = units(lane, unit, part);
#pragma unroll
    for (int i = 0; i < kUnitWords; ++i) words[unit * kUnitWords + i] = piece.word[i];
  }
#pragma unroll
  for (int i = 0; i < S::v_part_tiles; ++i) {
    const int word = i / S::V::tiles_per_word, tile = i % S::V::tiles_per_word;
    ByteSums sums;
    cute::clear(sums);
#pragma unroll
    for (int pair = 0; pair < kChunkBlocks / 2; ++pair) {
      const int first = 2 * pair * kWords + word;
      mma_unsigned(sums, v_bytes<S::page.v_bits>(words[first], words[first + kWords], tile),
                   tOrP(_, pair));
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const auto sum =
          static_cast<float>(static_cast<int>(sums(2 * row) * 256 + sums(2 * row + 1)));
      output.tOrO(row, 0, part * S::v_part_tiles + i) += sum * (factor * (row == 0 ? 1.f : kOdd));
    }
  }
}

// O^T += V^T P^T of a chunk: scores become weights, and weigh in.
template <Bytes S, class Groups, class Scale, class Page>
__device__ void add_chunk(const Page& page, const Groups& groups, const Scale& scale, int lane,
                          ScoreTensor<S, kChunkBlocks>& tSrS, Softmax<S>& softmax,
                          Output<S, Groups>& output) {
  constexpr int kPartChannels = S::head_dim / S::V::v_parts;
  constexpr float kLargest = 65280.f;  // P' as an integer: roundings don't carry it beyond 16 bits
  const float weight = weigh<S, kChunkBlocks>(tSrS, scale, softmax, output);
  const float largest = largest_weight<S>(largest_scales<S>(page, groups, lane), tSrS);
  const float up = kLargest * arch::reciprocal(largest);
#pragma unroll
  for (int i = 0; i < cute::size(tSrS); ++i) tSrS(i) *= up;
  const float factor = weight * largest * (1.f / kLargest);
  WeightBytes tOrP;
#pragma unroll
  for (int part = 0; part < S::V::v_parts; ++part) {
    if (begins_group(part * kPartChannels, groups.v_group())) {
      const int group = group_of(part * kPartChannels, groups.v_group());
      const RowValues scales = value_scales<S>(page, group, lane / 4);
      if constexpr (S::page.has_blocks()) {
        make_weights<S>(scales, tSrS, tOrP);
        output.zero_sum_of(part)(0) +=
            factor * kZeroOfWeight<S> * (sum_of_weights(tOrP) + lost_nan(scales));
      } else {
        const RowValues zeros{page.v_token_vectors(group)(lane / 4, 1)};
        output.zero_sum_of(part)(0) += factor * sum_of_zeros<S>(zeros, tSrS, 0);
        make_weights<S>(scales, tSrS, tOrP);
      }
    }
    add_part<S>(page, part, tOrP, factor, lane, output);
  }
}

// 16 fp16 tokens of a zone, those from `end` on hold anything and count for nothing.
template <Bytes S, class Groups>
__device__ void add_zone(const std::uint8_t* rows, const ScoreScale<S, 1>& scale, int end, int lane,
                         ScoreTensor<S, 1>& tSrS, Softmax<S>& softmax, Output<S, Groups>& output) {
  constexpr float kUp = 0x1p13f;  // of weights: small ones keep their bits in fp16
  const float weight = weigh<S, 1>(tSrS, scale, softmax, output) / kUp;
  auto tOrP = cute::make_tensor<std::uint32_t>(cute::Shape<_2>{});
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const __half2 pair = __floats2half2_rn(tSrS(row, 0, 0) * kUp, 0.f);
    tOrP(row) = arch::transpose_8x8(as_bits(pair));
  }
  FragmentA tOrV[S::tiles];
  load_zone_values<S>(rows, end, lane, tOrV);
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
    auto sums = cute::make_tensor<float>(cute::Shape<_4>{});
    cute::clear(sums);
    mma(sums, tOrV[k], tOrP);
    output.tOrO(0, 0, k) += sums(0) * weight;
    output.tOrO(1, 0, k) += sums(2) * weight;
  }
}

}  // namespace bitdecoding::decode
