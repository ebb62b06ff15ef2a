// SPDX-License-Identifier: Apache-2.0
// The register tensors of one decode stream and the two products, in MMA order (lane = 4g + t):
//   S^T (tokens x queries) = K Q^T      A = codes of K, m = token        B = q, n = query column
//   O^T (channels x queries) = V^T P^T  A = codes of V^T, m = channel    B = p, k = token
// Codes become A by a mask: two of them lie 16 bits apart in a word, and are fp16 subnormals.
#pragma once

#include <cuda_fp16.h>

#include <cute/arch/mma_sm80.hpp>
#include <cute/tensor.hpp>

#include "bitdecoding/decode/work.hpp"
#include "bitdecoding/layout/packed_kv_tensor.hpp"

namespace bitdecoding::decode {

using cute::_;
using cute::_2;
using cute::_4;
using cute::Int;

inline constexpr int kChunkBlocks = layout::kChunkBlocks;

template <DecodeConfig Config>
struct Shape {
  static constexpr layout::PageConfig page = Config.page;
  static constexpr int head_dim = page.head_dim;
  static constexpr int columns = Config.query_columns;
  static constexpr int n_tiles = columns / 8;
  static constexpr int tiles = head_dim / 16;  // of 16 channels
  using K = layout::CodeShape<page.k_bits, head_dim>;
  using V = layout::CodeShape<page.v_bits, head_dim>;
  static constexpr int v_part_tiles = tiles / V::v_parts;
};

// B operand of K Q^T: (pair of channels, n tile, channel tile), half2 each.
template <class S>
using QueryTensor =
    decltype(cute::make_tensor<std::uint32_t>(cute::Shape<_2, Int<S::n_tiles>, Int<S::tiles>>{}));
// Scores of Blocks 16-token blocks: (row and column of the MMA, n tile, block).
template <class S, int Blocks>
using ScoreTensor =
    decltype(cute::make_tensor<float>(cute::Shape<_4, Int<S::n_tiles>, Int<Blocks>>{}));
// B operand of V^T P^T: (pair of tokens, n tile, block), half2 each.
template <class S, int Blocks>
using WeightTensor =
    decltype(cute::make_tensor<std::uint32_t>(cute::Shape<_2, Int<S::n_tiles>, Int<Blocks>>{}));
// Output: (row and column of the MMA, n tile, channel tile).
template <class S>
using OutputTensor =
    decltype(cute::make_tensor<float>(cute::Shape<_4, Int<S::n_tiles>, Int<S::tiles>>{}));
// One value per query column of the lane: columns 2t and 2t + 1 of every n tile.
template <class S>
using ColumnTensor = decltype(cute::make_tensor<float>(cute::Shape<_2, Int<S::n_tiles>>{}));

struct FragmentA {
  std::uint32_t a[4];
};

// d (4) += A (m16 k16) * b (2)
template <class Accumulator, class B>
__device__ void mma(Accumulator&& d, const FragmentA& a, const B& b) {
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(d(0), d(1), d(2), d(3), a.a[0], a.a[1], a.a[2], a.a[3],
                                          b(0), b(1), d(0), d(1), d(2), d(3));
}

// Field f of both halves of a word: code * 2^(Bits * f - 24) as a pair of fp16.
template <int Bits>
__device__ std::uint32_t field(std::uint32_t word, int f) {
  constexpr std::uint32_t kField = ((1u << Bits) - 1u) * 0x00010001u;
  return word & (kField << (Bits * f));
}
// Powers of two that undo a field's position, and the common 2^24.
template <int Bits>
constexpr float position_factor(int f) {
  return 1.f / static_cast<float>(1 << (Bits * f));
}
inline constexpr float kCodeFactor = 16777216.f;

// Tile `tile` of a K word: rows g, g + 8 are the bytes u = 0, 1; columns + 8 are the next field.
template <int Bits>
__device__ FragmentA k_fragment(std::uint32_t word, int tile) {
  const std::uint32_t upper = word >> 8;
  return {field<Bits>(word, 2 * tile), field<Bits>(upper, 2 * tile),
          field<Bits>(word, 2 * tile + 1), field<Bits>(upper, 2 * tile + 1)};
}
// Tile `tile` of a V word: rows + 8 are the next field; tokens + 8 are the bytes u = 1.
template <int Bits>
__device__ FragmentA v_fragment(std::uint32_t word, int tile) {
  const std::uint32_t upper = word >> 8;
  return {field<Bits>(word, 2 * tile), field<Bits>(word, 2 * tile + 1),
          field<Bits>(upper, 2 * tile), field<Bits>(upper, 2 * tile + 1)};
}

// 2^e.
__device__ inline float power_of_two(int e) { return __int_as_float((e + 127) << 23); }

// Group sizes are powers of two: a mask and a shift instead of a division.
__device__ inline bool begins_group(int element, int group) { return (element & (group - 1)) == 0; }
__device__ inline int group_of(int element, int group) { return element >> log2_of(group); }

__device__ inline __half2 as_half2(std::uint32_t bits) {
  return *reinterpret_cast<const __half2*>(&bits);
}
__device__ inline std::uint32_t as_bits(__half2 pair) {
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ inline std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  return as_bits(__hmul2(as_half2(a), as_half2(b)));
}

}  // namespace bitdecoding::decode
