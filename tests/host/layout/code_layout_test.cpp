// SPDX-License-Identifier: Apache-2.0
// The proofs that matter to kernels are static_asserts; whole-layout properties run.
#include "bitdecoding/layout/code_layout.hpp"

#include <doctest.h>

#include <cmath>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <random>
#include <vector>

#include "bitdecoding/format/float16.hpp"
#include "page_reader.hpp"

namespace bitdecoding::layout {
namespace {

// ---- sm80 and sm90 want the same A operand ----

template <class Sm80Atom, class Sm90Atom>
constexpr bool same_operand_a() {
  using namespace cute;
  using Sm80 = decltype(make_tiled_mma(Sm80Atom{}, Layout<Shape<_4, _1, _1>>{}));
  const auto sm80 = Sm80{}.get_layoutA_TV();                   // (T128,V) -> (M64,K): V8, K16 or
  const auto sm90 = typename MMA_Traits<Sm90Atom>::ALayout{};  // of 8-bit elements V16, K32
  if (size<0>(sm80) != 128 || size(sm90) != size(sm80)) return false;
  for (int thread = 0; thread < 128; ++thread) {
    for (int value = 0; value < int(size<1>(sm80)); ++value) {
      if (int(sm80(thread, value)) != int(sm90(thread, value))) return false;
    }
  }
  return true;
}

using Sm80F16 = cute::SM80_16x8x16_F32F16F16F32_TN;
using Sm80Bf16 = cute::SM80_16x8x16_F32BF16BF16F32_TN;
using Sm80U8 = cute::SM80_16x8x32_S32U8S8S32_TN;
constexpr auto kMajorK = cute::GMMA::Major::K;
static_assert(same_operand_a<Sm80F16, cute::SM90_64x8x16_F32F16F16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80F16, cute::SM90_64x16x16_F32F16F16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80F16, cute::SM90_64x64x16_F32F16F16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80Bf16, cute::SM90_64x8x16_F32BF16BF16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80Bf16, cute::SM90_64x16x16_F32BF16BF16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80Bf16, cute::SM90_64x64x16_F32BF16BF16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80U8, cute::SM90_64x8x32_S32U8S8_RS_TN>());
static_assert(same_operand_a<Sm80U8, cute::SM90_64x16x32_S32U8S8_RS_TN>());
static_assert(same_operand_a<Sm80U8, cute::SM90_64x64x32_S32U8S8_RS_TN>());

// ---- every lane owns its words, in register order ----

// One m16k16 tile of an operand: (lane, (half, row, column)) -> code, where registers a0..a3 are
// (row, column) = (m + 8, k + 8). Lanes lie a unit apart, halves 16 bits. Columns of K and rows of
// V^T choose between bytes (8 bits apart) or fields (Bits apart); rows of K choose the word.
template <class Tile, int UnitCodes, int Half, int Row, int Column>
constexpr bool is_fragment_order() {
  using namespace cute;
  using Expected = Layout<Shape<Int<kLanes>, Shape<_2, _2, _2>>,
                          Stride<Int<UnitCodes>, Stride<Int<Half>, Int<Row>, Int<Column>>>>;
  const auto fragment = composition(Tile{}, OperandA{});  // (T32,V8) -> code
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int value = 0; value < 8; ++value) {
      if (int(fragment(lane, value)) != int(Expected{}(lane, value))) return false;
    }
  }
  return true;
}

// Layouts add up over tiles: one tile's order and the first code of every tile prove all.
// `code` = the tile's first code, `nth` = the place of its word among its lane's.
template <class Shape>
constexpr bool is_word_of_unit(int code, int field, int unit, int nth, int unit_words) {
  return code == (unit * unit_words + nth % unit_words) * Shape::codes_per_word + field;
}

// Word and field of channel tile 4s + 2p + q of K, in a lane's words of a block, for rows r = 0.
struct KPlace {
  int word, field;
};
template <int Bits>
constexpr KPlace k_tile_place(int tile) {
  const int s = tile / 4, p = tile % 4 / 2, q = tile % 2;
  return Bits == 2 ? KPlace{2 * s, p + 2 * q} : KPlace{4 * s + 2 * q, p};
}

template <int Bits, int HeadDim>
constexpr bool k_lanes_own_their_words() {
  using namespace cute;
  using S = CodeShape<Bits, HeadDim>;
  using Tiled = decltype(zipped_divide(k_code_layout<Bits, HeadDim>(), Shape<_16, _16>{}));
  using Tile = std::remove_cvref_t<decltype(get<0>(Tiled{}))>;  // (token 16, channel 16)
  const auto tiles = get<1>(Tiled{});                           // (block, tile) -> first code
  const auto units = k_unit_layout<Bits, HeadDim>();
  if (stride<0>(units) != 1) return false;
  for (int block = 0; block < kChunkBlocks; ++block) {
    for (int tile = 0; tile < HeadDim / 16; ++tile) {
      const auto [word, field] = k_tile_place<Bits>(tile);
      const int unit = units(0, word / S::k_unit_words, block);
      if (!is_word_of_unit<S>(tiles(block, tile), field, unit, word, S::k_unit_words)) return false;
    }
  }
  return is_fragment_order<Tile, S::k_unit_words * S::codes_per_word, 16 / Bits, S::codes_per_word,
                           8 / Bits>();
}

// The same for V^T: rows are channels, columns tokens.
template <int Bits, int HeadDim>
constexpr bool v_lanes_own_their_words() {
  using namespace cute;
  using S = CodeShape<Bits, HeadDim>;
  constexpr auto codes = v_code_layout<Bits, HeadDim>();
  constexpr auto transposed = make_layout(get<1>(codes), get<0>(codes));
  using Tiled = decltype(zipped_divide(transposed, Shape<_16, _16>{}));
  using Tile = std::remove_cvref_t<decltype(get<0>(Tiled{}))>;  // (channel 16, token 16)
  const auto tiles = get<1>(Tiled{});                           // (tile, block) -> first code
  const auto units = v_unit_layout<Bits, HeadDim>();
  if (stride<0>(units) != 1) return false;
  for (int block = 0; block < kChunkBlocks; ++block) {
    for (int tile = 0; tile < HeadDim / 16; ++tile) {
      const int word = tile / S::tiles_per_word;
      const int nth = block * S::v_part_words + word % S::v_part_words;  // in its part
      const int unit = units(0, nth / S::v_unit_words, word / S::v_part_words);
      const int field = tile % S::tiles_per_word * 2;  // a tile takes two fields of its word
      if (!is_word_of_unit<S>(tiles(tile, block), field, unit, nth, S::v_unit_words)) return false;
    }
  }
  return is_fragment_order<Tile, S::v_unit_words * S::codes_per_word, 16 / Bits, 1, 8 / Bits>();
}

static_assert(k_lanes_own_their_words<4, 256>() && v_lanes_own_their_words<4, 256>());
static_assert(k_lanes_own_their_words<2, 256>() && v_lanes_own_their_words<2, 256>());
static_assert(k_lanes_own_their_words<4, 128>() && v_lanes_own_their_words<4, 128>());
static_assert(k_lanes_own_their_words<2, 128>() && v_lanes_own_their_words<2, 128>());
static_assert(k_lanes_own_their_words<4, 64>() && v_lanes_own_their_words<4, 64>());
static_assert(k_lanes_own_their_words<2, 64>() && v_lanes_own_their_words<2, 64>());

// ---- a masked word is a register of the 8-bit MMA ----

// Rows of 32 columns: (lane, (byte, row, column)) -> code, where registers a0..a3 are (row, column)
// = (m + 8, k + 16). The four bytes of a register are those of a word. The MMA's column 16j + 4t +
// 2h + u is column 16j + 8u + 2t + h of the tile, for both operands.
template <int Bits, class Tile, int UnitCodes, int Row, int Column>
constexpr bool is_byte_fragment_order() {
  using namespace cute;
  using Expected = Layout<Shape<Int<kLanes>, Shape<_4, _2, _2>>,
                          Stride<Int<UnitCodes>, Stride<Int<8 / Bits>, Int<Row>, Int<Column>>>>;
  using Columns = Layout<Shape<_2, _2, _4, _2>, Stride<_8, _1, _2, _16>>;  // of (u, h, t, j)
  const auto operand = MMA_Traits<Sm80U8>::ALayout{};                      // (T32,V16) -> (M16,K32)
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int value = 0; value < 16; ++value) {
      const int element = operand(lane, value);
      const int code = Tile{}(element % 16, Columns{}(element / 16));
      if (code != int(Expected{}(lane, value))) return false;
    }
  }
  return true;
}

// Channels 64s + 32p + 16j + .. of a block: rows g + 8 are the next word; j = 1 is two fields, or
// two words, on.
template <int Bits, int HeadDim>
constexpr bool k_words_are_byte_registers() {
  using namespace cute;
  using S = CodeShape<Bits, HeadDim>;
  using Tiled = decltype(zipped_divide(k_code_layout<Bits, HeadDim>(), Shape<_16, _32>{}));
  using Tile = std::remove_cvref_t<decltype(get<0>(Tiled{}))>;  // (token 16, channel 32)
  return is_byte_fragment_order<Bits, Tile, S::k_unit_words * S::codes_per_word, S::codes_per_word,
                                Bits == 2 ? 2 : 2 * S::codes_per_word>();
}

// V^T, tokens of blocks 2i and 2i + 1: rows g + 8 are the next field; the other block is the same
// channels' next word of the unit.
template <int Bits, int HeadDim>
constexpr bool v_words_are_byte_registers() {
  using namespace cute;
  using S = CodeShape<Bits, HeadDim>;
  constexpr auto codes = v_code_layout<Bits, HeadDim>();
  constexpr auto transposed = make_layout(get<1>(codes), get<0>(codes));
  using Tiled = decltype(zipped_divide(transposed, Shape<_16, _32>{}));
  using Tile = std::remove_cvref_t<decltype(get<0>(Tiled{}))>;  // (channel 16, token 32)
  return 2 * S::v_part_words <= S::v_unit_words &&
         is_byte_fragment_order<Bits, Tile, S::v_unit_words * S::codes_per_word, 1,
                                S::v_part_words * S::codes_per_word>();
}

static_assert(k_words_are_byte_registers<4, 256>() && v_words_are_byte_registers<4, 256>());
static_assert(k_words_are_byte_registers<2, 256>() && v_words_are_byte_registers<2, 256>());
static_assert(k_words_are_byte_registers<4, 128>() && v_words_are_byte_registers<4, 128>());
static_assert(k_words_are_byte_registers<2, 128>() && v_words_are_byte_registers<2, 128>());
static_assert(k_words_are_byte_registers<4, 64>() && v_words_are_byte_registers<4, 64>());
static_assert(k_words_are_byte_registers<2, 64>() && v_words_are_byte_registers<2, 64>());

// ---- whole layouts ----

template <int Bits, int HeadDim>
struct Case {
  static constexpr int bits = Bits;
  static constexpr int head_dim = HeadDim;
  using Shape = CodeShape<Bits, HeadDim>;

  static constexpr KvFormat format() {
    return {.k_bits = Bits,
            .v_bits = Bits,
            .k_group = 64,
            .v_group = 64,
            .page_tokens = 64,
            .head_dim = HeadDim};
  }
  // f(token, channel, K code, V code)
  template <class F>
  static void for_each(const F& f) {
    for (int token = 0; token < kChunkTokens; ++token) {
      for (int channel = 0; channel < HeadDim; ++channel) {
        f(token, channel, int(k_code_layout<Bits, HeadDim>()(token, channel)),
          int(v_code_layout<Bits, HeadDim>()(token, channel)));
      }
    }
  }
};

#define CODE_CASES Case<4, 256>, Case<2, 256>, Case<4, 128>, Case<2, 128>, Case<4, 64>, Case<2, 64>

TEST_CASE_TEMPLATE("codes are numbered 0 to 64 D - 1, each once", C, CODE_CASES) {
  std::vector<int> k_seen(64 * C::head_dim), v_seen(64 * C::head_dim);
  C::for_each([&](int, int, int k, int v) {
    ++k_seen.at(k);
    ++v_seen.at(v);
  });
  CHECK(k_seen == std::vector<int>(64 * C::head_dim, 1));
  CHECK(v_seen == k_seen);
}

TEST_CASE_TEMPLATE("layouts equal the documented closed formulas", C, CODE_CASES) {
  const test::PageReader reader{C::format()};
  int differences = 0;
  C::for_each([&](int token, int channel, int k, int v) {
    const test::CodePlace kp = reader.k_place(token, channel), vp = reader.v_place(token, channel);
    differences += (kp.byte - reader.k_codes(0)) * 8 + kp.bit != k * C::bits;
    differences += (vp.byte - reader.v_codes(0)) * 8 + vp.bit != v * C::bits;
  });
  CHECK(differences == 0);
}

TEST_CASE_TEMPLATE("a byte holds codes of one token", C, CODE_CASES) {
  std::vector<int> k_token(C::Shape::chunk_bytes, -1), v_token(C::Shape::chunk_bytes, -1);
  int differences = 0;
  C::for_each([&](int token, int, int k, int v) {
    int& k_owner = k_token.at(k * C::bits / 8);
    int& v_owner = v_token.at(v * C::bits / 8);
    differences += (k_owner != -1 && k_owner != token) || (v_owner != -1 && v_owner != token);
    k_owner = v_owner = token;
  });
  CHECK(differences == 0);
}

TEST_CASE_TEMPLATE("a word of K holds codes of one token", C, CODE_CASES) {
  std::vector<int> owners(C::Shape::chunk_bytes / 4, -1);
  int differences = 0;
  C::for_each([&](int token, int, int k, int) {
    int& owner = owners.at(k / C::Shape::codes_per_word);
    differences += owner != -1 && owner != token;
    owner = token;
  });
  CHECK(differences == 0);
}

TEST_CASE_TEMPLATE("K units stay in a 16-token block, V units in a part of the channels", C,
                   CODE_CASES) {
  using S = typename C::Shape;
  int strays = 0;
  C::for_each([&](int token, int channel, int k, int v) {
    const int k_unit = k / (S::k_unit_words * S::codes_per_word);
    const int v_unit = v / (S::v_unit_words * S::codes_per_word);
    strays += k_unit / (kLanes * S::k_units) != token / kBlockTokens;
    strays += v_unit / (kLanes * S::v_units) != channel / (C::head_dim / S::v_parts);
  });
  CHECK(strays == 0);
}

TEST_CASE_TEMPLATE("warp w finds channels [wD/4, (w+1)D/4) in its parts, in its own fields", C,
                   CODE_CASES) {
  using S = typename C::Shape;
  const int parts_per_warp = S::v_parts / 4, fields = 8 / C::bits;
  int strays = 0;
  C::for_each([&](int, int channel, int, int v) {
    const int warp = channel / (C::head_dim / 4);
    const int part = v / (S::v_unit_words * S::codes_per_word * kLanes * S::v_units);
    const int field = v % fields;
    strays += parts_per_warp > 0 ? part / parts_per_warp != warp : part != warp / 2;
    strays += parts_per_warp == 0 && field / 2 != warp % 2;
  });
  CHECK(strays == 0);
}

// ---- dequantisation is a mask ----

TEST_CASE_TEMPLATE("a masked word is a pair of subnormals, code * 2^(field * bits - 24)", C,
                   CODE_CASES) {
  std::mt19937 random(2);
  for (int i = 0; i < 1000; ++i) {
    const auto word = static_cast<std::uint32_t>(random());
    for (int byte = 0; byte < 2; ++byte) {  // of each half
      for (int field = 0; field < 8 / C::bits; ++field) {
        const std::uint32_t low_mask = (1u << C::bits) - 1;
        const std::uint32_t pair = word >> (8 * byte) & low_mask * 0x10001u << field * C::bits;
        for (int half = 0; half < 2; ++half) {
          const int bit = 16 * half + 8 * byte + field * C::bits;
          const auto code = static_cast<float>(word >> bit & low_mask);
          const auto fp16 = static_cast<std::uint16_t>(pair >> 16 * half);
          const float expected = std::ldexp(code, field * C::bits - 24);
          if (format::float_from_fp16(fp16) != expected) FAIL("word ", word, " bit ", bit);
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitdecoding::layout
