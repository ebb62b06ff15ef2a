// SPDX-License-Identifier: Apache-2.0
// Codes as unsigned bytes, times bytes: a mask makes four of a word, k = 32 of an MMA takes a pair
// of tiles. Odd fields stay where they are and count kOddField times.
#pragma once

#include "bitdecoding/decode/fragments.cuh"

namespace bitdecoding::decode {

// B operand of K Q^T: (tile of the pair, pair of channel tiles), signed bytes of four channels.
template <Bytes S>
using QueryBytes = decltype(cute::make_tensor<std::uint32_t>(cute::Shape<_2, Int<S::tiles / 2>>{}));
// B operand of V^T P^T: (block of the pair, pair of blocks), unsigned bytes of four tokens.
using WeightBytes =
    decltype(cute::make_tensor<std::uint32_t>(cute::Shape<_2, Int<kChunkBlocks / 2>>{}));
// The accumulators of an MMA: 2 * row + part, upper bytes' sum first.
using ByteSums = decltype(cute::make_tensor<std::uint32_t>(cute::Shape<_4>{}));

// d (4) += A (m16 k32) * b (2)
template <class B>
__device__ void mma_signed(ByteSums& d, const FragmentA& a, const B& b) {
  cute::SM80_16x8x32_S32U8S8S32_TN::fma(d(0), d(1), d(2), d(3), a.a[0], a.a[1], a.a[2], a.a[3],
                                        b(0), b(1), d(0), d(1), d(2), d(3));
}
template <class B>
__device__ void mma_unsigned(ByteSums& d, const FragmentA& a, const B& b) {
  cute::SM80_16x8x32_S32U8U8S32_TN::fma(d(0), d(1), d(2), d(3), a.a[0], a.a[1], a.a[2], a.a[3],
                                        b(0), b(1), d(0), d(1), d(2), d(3));
}

template <int Bits>
inline constexpr int kOddField = 1 << Bits;

// Field f of the four bytes of a word, kOddField<Bits> times as large where f is odd.
template <int Bits>
__device__ std::uint32_t byte_field(std::uint32_t word, int f) {
  constexpr std::uint32_t kField = ((1u << Bits) - 1u) * 0x01010101u;
  return (f < 2 ? word : word >> 4) & (kField << (f % 2 * Bits));
}

// Tiles 2 * pair and 2 * pair + 1 of a block; their fields are as odd as the pair.
template <Bytes S>
__device__ FragmentA k_bytes(const KWords<S>& words, int pair) {
  constexpr int kBits = S::page.k_bits;
  FragmentA fragment;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i % 2, tile = 2 * pair + i / 2;
    fragment.a[i] = byte_field<kBits>(words[k_word<kBits>(tile, row)], k_field<kBits>(tile));
  }
  return fragment;
}
// Tile `tile` of the V words of two blocks: rows g are even fields, rows g + 8 odd ones.
template <int Bits>
__device__ FragmentA v_bytes(std::uint32_t first, std::uint32_t second, int tile) {
  return {byte_field<Bits>(first, 2 * tile), byte_field<Bits>(first, 2 * tile + 1),
          byte_field<Bits>(second, 2 * tile), byte_field<Bits>(second, 2 * tile + 1)};
}

}  // namespace bitdecoding::decode
