// SPDX-License-Identifier: Apache-2.0
// Codes as fp16: a mask makes two of a word, subnormals of value code * 2^(position - 24), which
// tensor cores multiply exactly.
#pragma once

#include <algorithm>

#include "bitdecoding/decode/fragments.cuh"

namespace bitdecoding::decode {

// B operand of V^T P^T: (pair of tokens, n tile, block), half2 each.
template <Halves S, int Blocks>
using WeightTensor =
    decltype(cute::make_tensor<std::uint32_t>(cute::Shape<_2, Int<S::n_tiles>, Int<Blocks>>{}));

// Operands of a zone that a lane holds at once, in tiles of 16 channels.
inline constexpr int kZoneTiles = 8;

// The accumulators of one MMA.
template <Halves S, class Tensor>
__device__ auto mma_tile(Tensor& tensor, int n, int tile) {
  return cute::make_tensor(tensor.data() + 4 * (n + S::n_tiles * tile), cute::Layout<_4>{});
}

// Field f of the bytes 0 and 2 of a word: code * 2^(Bits * f - 24) as a pair of fp16.
template <int Bits>
__device__ std::uint32_t half_field(std::uint32_t word, int f) {
  constexpr std::uint32_t kField = ((1u << Bits) - 1u) * 0x00010001u;
  return word & (kField << (Bits * f));
}
// Powers of two that undo a field's position, and the common 2^24.
template <int Bits>
constexpr float position_factor(int f) {
  return 1.f / static_cast<float>(1 << (Bits * f));
}
inline constexpr float kCodeFactor = 16777216.f;

// Channel tile `tile`; `words`: those of a block from tile 0 on. Channels + 8 are the upper bytes.
template <int Bits, class Words>
__device__ FragmentA k_halves(const Words& words, int tile) {
  const std::uint32_t low = words[k_word<Bits>(tile, 0)], high = words[k_word<Bits>(tile, 1)];
  const int f = k_field<Bits>(tile);
  return {half_field<Bits>(low, f), half_field<Bits>(high, f), half_field<Bits>(low >> 8, f),
          half_field<Bits>(high >> 8, f)};
}
// Tile `tile` of a V word: rows + 8 are the next field; tokens + 8 are the upper bytes.
template <int Bits>
__device__ FragmentA v_halves(std::uint32_t word, int tile) {
  const std::uint32_t upper = word >> 8;
  return {half_field<Bits>(word, 2 * tile), half_field<Bits>(word, 2 * tile + 1),
          half_field<Bits>(upper, 2 * tile), half_field<Bits>(upper, 2 * tile + 1)};
}

}  // namespace bitdecoding::decode
