// SPDX-License-Identifier: Apache-2.0
// fp16 tile -> codes -> packed units. ldmatrix hands each lane the MMA's A fragment (V transposed
// on the way), whose eight values go to two words of K, rows 8 apart, or to one word of V.
//   in  sX (N,D) fp16, coders in shared memory    out  the units of the page, 16 or 8 bytes a lane
#pragma once

#include <cuda_fp16.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/tensor.hpp>

#include <bit>
#include <cstdint>

#include "bitdecoding/format/quantizer.hpp"
#include "bitdecoding/layout/code_layout.hpp"
#include "bitdecoding/layout/page_config.hpp"
#include "bitdecoding/quantize/group_range.cuh"
#include "bitdecoding/quantize/token_tile.cuh"

namespace bitdecoding::quantize {

// One lane's A fragment of a 16x16 tile: value (h, m8, k8) is half h of register m8 + 2 * k8.
struct Fragment {
  std::uint32_t pair[4];

  __device__ float value(int h, int m8, int k8) const {
    const __half2 two = *reinterpret_cast<const __half2*>(&pair[m8 + 2 * k8]);
    return h == 0 ? __low2float(two) : __high2float(two);
  }
};

// A = K: m = token, k = channel.
template <class Tile>
__device__ Fragment load_k_fragment(const Tile& sX, int token, int channel, int lane) {
  Fragment f;
  const auto& row = sX(token + lane % 16, channel + lane / 16 * 8);
  cute::SM75_U32x4_LDSM_N::copy(reinterpret_cast<const cute::uint128_t&>(row), f.pair[0], f.pair[1],
                                f.pair[2], f.pair[3]);
  return f;
}

// A = V^T: m = channel, k = token.
template <class Tile>
__device__ Fragment load_v_fragment(const Tile& sX, int token, int channel, int lane) {
  Fragment f;
  const auto& row = sX(token + lane / 16 * 8 + lane % 8, channel + lane / 8 % 2 * 8);
  cute::SM75_U16x8_LDSM_T::copy(reinterpret_cast<const cute::uint128_t&>(row), f.pair[0], f.pair[1],
                                f.pair[2], f.pair[3]);
  return f;
}

// Bit of a unit that fragment value (h, m8, k8) of the unit's `tile`-th 16x16 tile gets, read off
// the code layout at the chunk's first unit.
template <int Bits, int HeadDim>
constexpr int k_unit_bit(int h, int m8, int k8, int tile) {
  return Bits * layout::k_code_layout<Bits, HeadDim>()(8 * m8, 16 * tile + 8 * k8 + h);
}
// V: the same of a word.
template <int Bits, int HeadDim>
constexpr int v_word_bit(int h, int m8, int k8, int tile) {
  return Bits * layout::v_code_layout<Bits, HeadDim>()(8 * k8 + h, 16 * tile + 8 * m8);
}

// clamp(rint((value - zero) / scale), 0, max_code) + kRounding's bits, ties to even; NaN gives 0.
// All is 2^-Bits times as large as in GroupCoder::code(), which changes no rounding: the clamp at 0
// and at NaN then is the saturation of a product.
template <int Bits>
inline constexpr float kRounding = 12582912.f / (1 << Bits);  // its last bit is a code's

template <int Bits>
__device__ std::uint32_t rounded_code(float value, const Coder& coder) {
  constexpr float kTop = static_cast<float>(format::max_code(Bits)) / (1 << Bits);
  const float scaled = __saturatef(__fmul_rn(__fsub_rn(value, coder.zero), coder.factor));
  return __float_as_uint(__fadd_rn(fminf(scaled, kTop), kRounding<Bits>));
}

// A word before its codes are added: less what they bring along of kRounding's bits.
template <int Bits>
constexpr std::uint32_t empty_word() {
  std::uint32_t word = 0;
  for (int at = 0; at < layout::kWord_bits; at += Bits) {
    word -= std::bit_cast<std::uint32_t>(kRounding<Bits>) << at;
  }
  return word;
}
template <int Bits, class Unit>
__device__ Unit empty_unit() {
  Unit unit;
  for (std::uint32_t& word : unit.word) word = empty_word<Bits>();
  return unit;
}

// Adds a fragment's codes to a unit: each at bit(h, m8, k8), by the coder of its group,
// coder(h, m8, k8). A sum is one instruction a code, without a mask.
template <int Bits, class CoderOf, class Bit, class Unit>
__device__ void add_codes(const Fragment& f, const CoderOf& coder, const Bit& bit, Unit& unit) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int h = i % 2, m8 = i / 2 % 2, k8 = i / 4;
    const std::uint32_t code = rounded_code<Bits>(f.value(h, m8, k8), coder(h, m8, k8));
    const int at = bit(h, m8, k8);
    unit.word[at / layout::kWord_bits] += code << at % layout::kWord_bits;
  }
}

// Packs sK (N,D).
template <layout::PageConfig Config, int Threads, class Page, class Tile, class Table>
__device__ void pack_k_units(const Page& page, const Tile& sK, const Table& table) {
  using S = typename Page::K;
  constexpr int kBits = Config.k_bits;
  const KvFormat& format = page.record().format();
  const int lane = threadIdx.x % layout::kLanes;
  const int g = lane / 4, t = lane % 4;
  const int group_log2 = log2_of(format.k_group);
  const int blocks = format.page_tokens / layout::kBlockTokens;
#pragma unroll 1
  for (int item = threadIdx.x / layout::kLanes; item < blocks * S::k_units;
       item += Threads / layout::kLanes) {
    const int block = item / S::k_units, unit = item % S::k_units;
    const int token = block * layout::kBlockTokens;
    auto packed = empty_unit<kBits, typename Page::KUnit>();
#pragma unroll
    for (int tile = 0; tile < S::k_unit_words * S::tiles_per_word; ++tile) {
      const int channel = (unit * S::k_unit_words * S::tiles_per_word + tile) * 16;
      const auto coder = [&](int h, int m8, int k8) -> const Coder& {
        if constexpr (Config.k_axis == KAxis::channel) {
          return table.coder[token >> group_log2][channel + 8 * k8 + 2 * t + h];
        } else {
          return table.coder[channel >> group_log2][token + 8 * m8 + g];
        }
      };
      const auto bit = [&](int h, int m8, int k8) {
        return k_unit_bit<kBits, Config.head_dim>(h, m8, k8, tile);
      };
      add_codes<kBits>(load_k_fragment(sK, token, channel, lane), coder, bit, packed);
    }
    constexpr int kBlocks = layout::kChunkBlocks;
    page.k_units(block / kBlocks)(lane, unit, block % kBlocks) = packed;
  }
}

// Packs sV (N,D).
template <layout::PageConfig Config, int Threads, class Page, class Tile, class Table>
__device__ void pack_v_units(const Page& page, const Tile& sV, const Table& table) {
  using S = typename Page::V;
  constexpr int kBits = Config.v_bits;
  constexpr int kChunkUnits = S::v_parts * S::v_units;
  const KvFormat& format = page.record().format();
  const int lane = threadIdx.x % layout::kLanes;
  const int t = lane % 4;
  const int group_log2 = log2_of(format.v_group);
#pragma unroll 1
  for (int item = threadIdx.x / layout::kLanes; item < format.chunks() * kChunkUnits;
       item += Threads / layout::kLanes) {
    const int chunk = item / kChunkUnits;
    const int part = item % kChunkUnits / S::v_units, unit = item % S::v_units;
    auto packed = empty_unit<kBits, typename Page::VUnit>();
#pragma unroll
    for (int tile = 0; tile < S::v_unit_words * S::tiles_per_word; ++tile) {
      const int word_index = unit * S::v_unit_words + tile / S::tiles_per_word;  // in the part
      const int block = word_index / S::v_part_words;
      const int word_channel = part * S::v_part_words + word_index % S::v_part_words;
      const int token = chunk * kChunkTokens + block * layout::kBlockTokens;
      const int channel = (word_channel * S::tiles_per_word + tile % S::tiles_per_word) * 16;
      const auto coder = [&](int h, int, int k8) -> const Coder& {
        return table.coder[channel >> group_log2][token + 8 * k8 + 2 * t + h];
      };
      const auto bit = [&](int h, int m8, int k8) {
        return tile / S::tiles_per_word * layout::kWord_bits +
               v_word_bit<kBits, Config.head_dim>(h, m8, k8, tile % S::tiles_per_word);
      };
      add_codes<kBits>(load_v_fragment(sV, token, channel, lane), coder, bit, packed);
    }
    page.v_units(chunk)(lane, unit, part) = packed;
  }
}

}  // namespace bitdecoding::quantize
