// SPDX-License-Identifier: Apache-2.0
// Products of a warpgroup: A = codes in registers, as for an MMA of a warp (halves/fragments.cuh), B
// in shared memory. Of 64 rows warp w has 16:
//   S^T (64 tokens x queries)      its rows are the tokens 16w ..
//   O^T (channels x queries)       D / 64 tiles of 64; of tile i its rows are the channels w * D/4 + 16i ..
// A lane has of every 8 columns the accumulators 4n + 2 * row + e: row g + 8 * row, column 8n + 2t + e.
//   B  core matrices of 8 columns x 8 k, 128 bytes in one piece, 16 of each column; side by side those
//      of all columns, behind them those of the next 8 k (K-major, no swizzle)
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include <cutlass/arch/barrier.h>

#include "bitdecoding/decode/halves/fragments.cuh"
#include "bitdecoding/decode/stream_threads.cuh"

namespace bitdecoding::decode {

inline constexpr int kGroupWarps = 4;

// A warp's share of the columns, where columns are dealt to warps: of queries, and in zones.
template <Wgmma S>
using WarpColumns = Shape<DecodeConfig{Arch::sm90, S::page, S::columns / kGroupWarps}>;

// A lane's columns: 2n + e stands for 8n + 2t + e.
template <Wgmma S>
struct GroupShape {
  static constexpr int n_tiles = S::columns / 8;
  static constexpr int lane_columns = 2 * n_tiles;
  static constexpr int accumulators = 4 * n_tiles;
  static constexpr int output_tiles = S::head_dim / 64;
  static constexpr int warp_channels = S::head_dim / kGroupWarps;
};

template <Wgmma S>
struct GroupTile {
  float d[GroupShape<S>::accumulators];
};

inline constexpr int kCoreBytes = 128;

// Of the core matrix (8 columns, 8 k); a lane's pair of k (2t, column g) is word `lane` of it.
template <Wgmma S>
constexpr int core_matrix(int n, int k) {
  return kCoreBytes * (k * GroupShape<S>::n_tiles + n);
}

// A descriptor of B, from its first core matrix on: the half that has the address. Addresses end below
// 2^18.
struct OperandB {
  std::uint32_t low;
};
template <Wgmma S>
__device__ OperandB operand_b(const void* first) {
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(first) >> 4;
  descriptor.bitfield.leading_byte_offset_ = core_matrix<S>(0, 1) >> 4;  // to the next 8 k
  // The same in all lanes, and the compiler sees it: descriptors lie in uniform registers.
  return {__shfl_sync(0xffffffffu, descriptor.reg32_[0], 0)};
}
// B of the 16 k from 16 * block on.
template <Wgmma S>
__device__ std::uint64_t descriptor_b(OperandB operand, int block) {
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.stride_byte_offset_ = core_matrix<S>(1, 0) >> 4;  // to the next 8 columns
  descriptor.bitfield.layout_type_ =
      static_cast<std::uint8_t>(cute::SM90::GMMA::LayoutType::INTERLEAVE);
  descriptor.reg32_[0] = operand.low + block * (core_matrix<S>(0, 2) >> 4);
  return descriptor;
}

// d (64 x columns) = or += A (64 x 16) B (16 x columns), begun; between begin_products and end_products.
template <Wgmma S, std::size_t... I>
__device__ void multiply_group(float* d, const FragmentA& a, std::uint64_t b, bool adds,
                               std::index_sequence<I...>) {
  using cute::SM90::GMMA::Major;
  using cute::SM90::GMMA::ScaleOut;
  using Atom = std::conditional_t<S::columns == 32,
                                  cute::SM90::GMMA::MMA_64x32x16_F32F16F16_RS<Major::K, Major::K>,
                                  cute::SM90::GMMA::MMA_64x64x16_F32F16F16_RS<Major::K, Major::K>>;
  Atom::fma(a.a[0], a.a[1], a.a[2], a.a[3], b, d[I]..., adds ? ScaleOut::One : ScaleOut::Zero);
}
template <Wgmma S>
__device__ void multiply_group(GroupTile<S>& d, const FragmentA& a, std::uint64_t b, bool adds) {
  multiply_group<S>(d.d, a, b, adds, std::make_index_sequence<GroupShape<S>::accumulators>{});
}

template <Wgmma S>
__device__ void fence(GroupTile<S>& tile) {
#pragma unroll
  for (float& d : tile.d) cute::warpgroup_fence_operand(d);
}
template <Wgmma S, int Count>
__device__ void fence(GroupTile<S> (&tiles)[Count]) {
#pragma unroll
  for (GroupTile<S>& tile : tiles) fence<S>(tile);
}
template <int Count>
__device__ void fence(FragmentA (&fragments)[Count]) {
#pragma unroll
  for (FragmentA& fragment : fragments) {
#pragma unroll
    for (std::uint32_t& a : fragment.a) cute::warpgroup_fence_operand(a);
  }
}

// What threads have written to shared memory becomes what the products after the next barrier read.
__device__ inline void publish_operand() { cutlass::arch::fence_view_async_shared(); }

}  // namespace bitdecoding::decode
