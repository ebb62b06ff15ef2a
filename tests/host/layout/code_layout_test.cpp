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
  const auto sm80 = Sm80{}.get_layoutA_TV();                   // (T128,V8) -> (M64,K16)
  const auto sm90 = typename MMA_Traits<Sm90Atom>::ALayout{};  // (T128,V8) -> (M64,K16)
  if (size<0>(sm80) != 128 || size<1>(sm80) != 8 || size(sm90) != size(sm80)) return false;
  for (int thread = 0; thread < 128; ++thread) {
    for (int value = 0; value < 8; ++value) {
      if (int(sm80(thread, value)) != int(sm90(thread, value))) return false;
    }
  }
  return true;
}

using Sm80F16 = cute::SM80_16x8x16_F32F16F16F32_TN;
using Sm80Bf16 = cute::SM80_16x8x16_F32BF16BF16F32_TN;
constexpr auto kMajorK = cute::GMMA::Major::K;
static_assert(same_operand_a<Sm80F16, cute::SM90_64x8x16_F32F16F16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80F16, cute::SM90_64x16x16_F32F16F16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80F16, cute::SM90_64x64x16_F32F16F16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80Bf16, cute::SM90_64x8x16_F32BF16BF16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80Bf16, cute::SM90_64x16x16_F32BF16BF16_RS<kMajorK, kMajorK>>());
static_assert(same_operand_a<Sm80Bf16, cute::SM90_64x64x16_F32BF16BF16_RS<kMajorK, kMajorK>>());

// ---- every lane owns its words, in register order ----

// One m16k16 tile of an operand: (lane, (half, row, column)) -> code, where registers a0..a3 are
// (row, column) = (m + 8, k + 8). Lanes lie a unit apart, halves 16 bits; rows and columns choose
// between byte (8 bits apart) and field (Bits apart).
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
// `code`, `nth` = the first code and the place among its lane's words of the tile's word.
template <class Shape>
constexpr bool is_word_of_unit(int code, int tile, int unit, int nth, int unit_words) {
  const int first = (unit * unit_words + nth % unit_words) * Shape::codes_per_word;
  return code == first + tile % Shape::tiles_per_word * 2;  // a tile takes two fields of its word
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
      const int word = tile / S::tiles_per_word;
      const int unit = units(0, word / S::k_unit_words, block);
      if (!is_word_of_unit<S>(tiles(block, tile), tile, unit, word, S::k_unit_words)) return false;
    }
  }
  return is_fragment_order<Tile, S::k_unit_words * S::codes_per_word, 16 / Bits, 8 / Bits, 1>();
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
      if (!is_word_of_unit<S>(tiles(tile, block), tile, unit, nth, S::v_unit_words)) return false;
    }
  }
  return is_fragment_order<Tile, S::v_unit_words * S::codes_per_word, 16 / Bits, 1, 8 / Bits>();
}

static_assert(k_lanes_own_their_words<4, 128>() && v_lanes_own_their_words<4, 128>());
static_assert(k_lanes_own_their_words<2, 128>() && v_lanes_own_their_words<2, 128>());
static_assert(k_lanes_own_their_words<4, 64>() && v_lanes_own_their_words<4, 64>());
static_assert(k_lanes_own_their_words<2, 64>() && v_lanes_own_their_words<2, 64>());

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

#define CODE_CASES Case<4, 128>, Case<2, 128>, Case<4, 64>, Case<2, 64>

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

TEST_CASE_TEMPLATE("warp w finds channels [wD/4, (w+1)D/4) in its part, in its own fields", C,
                   CODE_CASES) {
  using S = typename C::Shape;
  const int warps_per_part = 4 / S::v_parts, fields = 8 / C::bits;
  int strays = 0;
  C::for_each([&](int, int channel, int, int v) {
    const int warp = channel / (C::head_dim / 4);
    const int part = v / (S::v_unit_words * S::codes_per_word * kLanes * S::v_units);
    const int field = v % fields;
    strays += part != warp / warps_per_part;
    strays += warps_per_part == 2 && field / 2 != warp % 2;
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
