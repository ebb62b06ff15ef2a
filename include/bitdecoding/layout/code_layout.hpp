// SPDX-License-Identifier: Apache-2.0
// Where the code of (token, channel) lies in a chunk of 64 tokens: CuTe layouts induced from the
// A operand of the tensor-core MMA, so that a lane's packed words are its MMA registers in order.
//   lane = 4g + t     word: byte y = 2h + u, field f at bit f * bits of the byte
//   K  token 16*block + g + 8r    channel 64s + 32p + 16q + 8u + 2t + h    (s: span of 64 channels)
//      2 bits: word 2s + r, field p + 2q        4 bits: word 4s + 2q + r, field p
//   V  token 16*block + 2t + h + 8u    channel 8F*word + 8f + g            (F = 8 / bits fields)
// Bits run along channels only: a byte holds codes of one token, and so does a word of K. A masked
// word is a register: of m16k16 two fp16 subnormals; of m16k32 four 8-bit codes, where the MMA's
// column 16j + 4t + y is the operand's 16j + 8u + 2t + h. tests: host/layout/code_layout
#pragma once

#include <cute/tensor.hpp>

#include <cute/atom/mma_traits_sm80.hpp>

#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::layout {

inline constexpr int kLanes = 32;
inline constexpr int kWord_bits = 32;
inline constexpr int kBlockTokens = 16;  // tokens of one MMA tile
inline constexpr int kChunkBlocks = kChunkTokens / kBlockTokens;
inline constexpr int kSpanChannels = 64;  // four MMA tiles, which K's words interleave

// (T32,V8) -> (M16,K16): the operand all packed words are induced from. sm90's wgmma (A from
// registers) gives each warp of a warpgroup the same order; the test of this file proves it.
using OperandA = cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>::ALayout;

// How the codes of one operand divide among words, units and, for V, parts of the channels.
template <int Bits, int HeadDim>
struct CodeShape {
  static constexpr int codes_per_word = kWord_bits / Bits;
  static constexpr int tiles_per_word = codes_per_word / 8;  // an m16k16 tile holds 8 per lane
  // Words of one lane in one 16-token block.
  static constexpr int block_words = HeadDim / 16 / tiles_per_word;

  // K: words of one span; the two rows of the same codes (r = 0, 1) are neighbours.
  static constexpr int k_spans = HeadDim / kSpanChannels;
  static constexpr int k_span_words = block_words / k_spans;

  // A unit is what a lane reads at once. K: 16 bytes, or 8 where a block has no more.
  static constexpr int k_unit_words = block_words < 4 ? block_words : 4;
  static constexpr int k_units = block_words / k_unit_words;  // per lane and block
  static constexpr int k_unit_spans = k_unit_words / k_span_words;
  // V: 16 bytes, filled along the blocks of a chunk.
  static constexpr int v_unit_words = 4;
  // Channels split in four parts, one for each warp of a warpgroup; in two where a word already
  // spans a half (then two warps share a part's units and each takes half of the fields); in more
  // where a part would exceed 32 channels, the smallest group: a part has one scale.
  static constexpr int least_parts = block_words < 4 ? block_words : 4;
  static constexpr int v_parts = HeadDim / 32 > least_parts ? HeadDim / 32 : least_parts;
  static constexpr int v_part_words = block_words / v_parts;                  // per block
  static constexpr int v_units = v_part_words * kChunkBlocks / v_unit_words;  // per lane and part

  static constexpr int chunk_bytes = kChunkTokens * HeadDim * Bits / 8;
};

namespace detail {

// (M16,K16) -> code offset inside one lane's word plus lane * LaneStride, given the code strides of
// the operand's three value bits (k + 1, m + 8, k + 8).
template <int LaneStride, int K1, int M8, int K8>
constexpr auto operand_tile() {
  using namespace cute;
  const auto lane_value_to_code =
      Layout<Shape<_32, _2, _2, _2>, Stride<Int<LaneStride>, Int<K1>, Int<M8>, Int<K8>>>{};
  const auto tile_to_lane_value = right_inverse(OperandA{}).with_shape(Shape<_16, _16>{});
  return composition(lane_value_to_code, tile_to_lane_value);  // (M16,K16) -> code
}

}  // namespace detail

// (token 64, channel HeadDim) -> code, counted from the start of the chunk's K codes.
template <int Bits, int HeadDim>
constexpr auto k_code_layout() {
  using namespace cute;
  using S = CodeShape<Bits, HeadDim>;
  constexpr int unit_codes = S::k_unit_words * S::codes_per_word;
  // K is row major in the MMA's A: m = token, k = channel. Rows m + 8 are the next word.
  const auto tile = detail::operand_tile<unit_codes, 16 / Bits, S::codes_per_word, 8 / Bits>();
  const auto blocks = Layout<Int<kChunkBlocks>, Int<kLanes * S::k_units * unit_codes>>{};
  // Tile 2p + q of a span: p is the next field; q is two fields on or, where a byte has no more,
  // two words on.
  constexpr int q = Bits == 2 ? 2 : 2 * S::codes_per_word;
  const auto tiles = Layout<Shape<_2, _2>, Stride<Int<q>, _1>>{};
  const auto spans =
      Layout<Shape<Int<S::k_unit_spans>, Int<S::k_units>>,
             Stride<Int<S::k_span_words * S::codes_per_word>, Int<kLanes * unit_codes>>>{};
  return make_layout(make_layout(get<0>(tile), blocks),         // token    (16, block)
                     make_layout(get<1>(tile), tiles, spans));  // channel  (16, (q, p), span)
}

// (token 64, channel HeadDim) -> code, counted from the start of the chunk's V codes.
template <int Bits, int HeadDim>
constexpr auto v_code_layout() {
  using namespace cute;
  using S = CodeShape<Bits, HeadDim>;
  constexpr int unit_codes = S::v_unit_words * S::codes_per_word;
  // A = V^T: m = channel, k = token.
  const auto tile = detail::operand_tile<unit_codes, 16 / Bits, 1, 8 / Bits>();
  // Words of a part run along its channels first, then along the blocks, through its units.
  const auto part_words = Layout<Shape<Int<S::v_unit_words>, Int<S::v_units>>,
                                 Stride<Int<S::codes_per_word>, Int<kLanes * unit_codes>>>{};
  const auto word_block =
      composition(part_words, Layout<Shape<Int<S::v_part_words>, Int<kChunkBlocks>>,
                                     Stride<_1, Int<S::v_part_words>>>{});  // (word, block) -> code
  const auto tiles = Layout<Int<S::tiles_per_word>, _2>{};
  const auto parts = Layout<Int<S::v_parts>, Int<kLanes * S::v_units * unit_codes>>{};
  return make_layout(
      make_layout(get<1>(tile), get<1>(word_block)),                 // token    (16, block)
      make_layout(get<0>(tile), tiles, get<0>(word_block), parts));  // channel  (16,tile,word,part)
}

// (lane, unit, block) -> unit of a chunk's K codes.
template <int Bits, int HeadDim>
constexpr auto k_unit_layout() {
  using S = CodeShape<Bits, HeadDim>;
  return cute::make_layout(
      cute::Shape<cute::Int<kLanes>, cute::Int<S::k_units>, cute::Int<kChunkBlocks>>{});
}

// (lane, unit, part) -> unit of a chunk's V codes.
template <int Bits, int HeadDim>
constexpr auto v_unit_layout() {
  using S = CodeShape<Bits, HeadDim>;
  return cute::make_layout(
      cute::Shape<cute::Int<kLanes>, cute::Int<S::v_units>, cute::Int<S::v_parts>>{});
}

}  // namespace bitdecoding::layout
