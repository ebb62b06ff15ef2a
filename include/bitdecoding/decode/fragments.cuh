// SPDX-License-Identifier: Apache-2.0
// The register tensors of one decode stream and its products, in MMA order (lane = 4g + t):
//   S^T (tokens x queries) = K Q^T      A = codes of K, m = token        B = q, n = query column
//   O^T (channels x queries) = V^T P^T  A = codes of V^T, m = channel    B = p, k = token
// A lane has the rows g and g + 8 of a tile, and of every four query columns one.
#pragma once

#include <cuda_fp16.h>

#include <cute/arch/mma_sm80.hpp>
#include <cute/tensor.hpp>

#include "bitdecoding/decode/work.hpp"
#include "bitdecoding/layout/packed_kv_tensor.hpp"

namespace bitdecoding::decode {

using cute::_;
using cute::_1;
using cute::_2;
using cute::_4;
using cute::Int;
using cute::Stride;

inline constexpr int kChunkBlocks = layout::kChunkBlocks;

template <DecodeConfig Config>
struct Shape {
  static constexpr layout::PageConfig page = Config.page;
  static constexpr Product product = Config.product();
  static constexpr int head_dim = page.head_dim;
  static constexpr int columns = Config.query_columns;
  static constexpr int lane_columns = columns / 4;
  // Products of fp16: MMA columns 2t and 2t + 1 are two query columns; of bytes: parts of one.
  static constexpr int tile_columns = product == Product::bytes ? 4 : 8;
  static constexpr int n_tiles = columns / tile_columns;
  static constexpr int tiles = head_dim / 16;  // of 16 channels
  using K = layout::CodeShape<page.k_bits, head_dim>;
  using V = layout::CodeShape<page.v_bits, head_dim>;
  static constexpr int v_part_tiles = tiles / V::v_parts;

  // The query column that is a lane's column c: in accumulators, and as row g of B.
  static constexpr int column(int c, int t) {
    return product == Product::halves ? c / 2 * 8 + 2 * t + c % 2 : 4 * c + t;
  }
  static constexpr int operand_column(int n, int g) {
    return product == Product::halves ? 8 * n + g : 4 * n + g / 2;
  }
  // Lanes that hold a column of B, and their channels. Two lots have a column of bytes: each looks
  // after half of its channels, odd g the upper half.
  static constexpr int column_lanes = product == Product::halves ? 4 : 8;
  static constexpr int own_tiles = product == Product::halves ? tiles : tiles / 2;
  static constexpr int first_own_tile(int g) {
    return product == Product::halves ? 0 : g % 2 * own_tiles;
  }
  // The lane whose g is that of its own column c.
  static constexpr int operand_lane(int c, int t) {
    return 4 * (product == Product::halves ? 2 * t + c % 2 : 2 * t);
  }
};
template <class S>
concept Halves = S::product == Product::halves;
template <class S>
concept Bytes = S::product == Product::bytes;
template <class S>
concept Wgmma = S::product == Product::wgmma;

// Accumulators by (row, column of the lane, tile): a tile of halves is an MMA's four values.
template <class S, int Tiles>
struct AccumulatorLayout {
  using type = cute::Layout<cute::Shape<_2, Int<S::lane_columns>, Int<Tiles>>>;
};
template <Halves S, int Tiles>
struct AccumulatorLayout<S, Tiles> {
  using type = cute::Layout<cute::Shape<_2, cute::Shape<_2, Int<S::n_tiles>>, Int<Tiles>>,
                            Stride<_2, Stride<_1, _4>, Int<4 * S::n_tiles>>>;
};
template <class S, int Tiles>
using AccumulatorTensor =
    decltype(cute::make_tensor<float>(typename AccumulatorLayout<S, Tiles>::type{}));

// Scores of Blocks 16-token blocks: (row, column, block), token 16 * block + 8 * row + g.
template <class S, int Blocks>
using ScoreTensor = AccumulatorTensor<S, Blocks>;
// Output: (row, column, channel tile), channel 16 * tile + 8 * row + g.
template <class S>
using OutputTensor = AccumulatorTensor<S, S::tiles>;
// One value per query column of the lane.
template <class S>
using ColumnTensor = decltype(cute::make_tensor<float>(cute::Shape<Int<S::lane_columns>>{}));
// q as B operand of fp16 products: (pair of channels, n tile, own channel tile), half2 each.
template <class S>
using QueryTensor = decltype(cute::make_tensor<std::uint32_t>(
    cute::Shape<_2, Int<S::n_tiles>, Int<S::own_tiles>>{}));

struct FragmentA {
  std::uint32_t a[4];
};

// A whose elements are all 1, fp16.
__device__ inline FragmentA ones() { return {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u}; }

// d (4) += A (m16 k16) * b (2), fp16
template <class Accumulator, class B>
__device__ void mma(Accumulator&& d, const FragmentA& a, const B& b) {
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(d(0), d(1), d(2), d(3), a.a[0], a.a[1], a.a[2], a.a[3],
                                          b(0), b(1), d(0), d(1), d(2), d(3));
}

// A lane's K words of a 16-token block; tile 4 * span + 2 * parity + second of 16 channels is in
// field `parity` (4 bits), or parity + 2 * second (2 bits), of word k_word for row g + 8 * row.
template <class S>
using KWords = std::uint32_t[S::K::block_words];

template <class S, class Units>
__device__ void load_words(const Units& units, int lane, int block, KWords<S>& words) {
  constexpr int kUnitWords = S::K::k_unit_words;
#pragma unroll
  for (int unit = 0; unit < S::K::k_units; ++unit) {
    const auto piece = units(lane, unit, block);
#pragma unroll
    for (int i = 0; i < kUnitWords; ++i) words[unit * kUnitWords + i] = piece.word[i];
  }
}
template <int Bits>
constexpr int k_word(int tile, int row) {
  return Bits == 2 ? tile / 4 * 2 + row : tile / 4 * 4 + tile % 2 * 2 + row;
}
template <int Bits>
constexpr int k_field(int tile) {
  return Bits == 2 ? tile / 2 % 2 + tile % 2 * 2 : tile / 2 % 2;
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
