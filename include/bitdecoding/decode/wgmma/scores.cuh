// SPDX-License-Identifier: Apache-2.0
// S^T = K Q'^T of a chunk by a warpgroup, and what is known of a lane's two tokens.
#pragma once

#include "bitdecoding/decode/scores.cuh"
#include "bitdecoding/decode/wgmma/query.cuh"

namespace bitdecoding::decode {

// Scale and zero-point of a lane's tokens: 16 * warp + g + 8 * row.
struct TokenPair {
  float scale[2], zero[2];

  TokenPair() = default;
  // `vectors` (g, scale | zero): 16-byte pieces, tokens 8i + g.
  template <class Vectors>
  __device__ TokenPair(const Vectors& vectors, int warp, int lane) {
    for (int which = 0; which < 2; ++which) {
      const auto* pairs = reinterpret_cast<const __half2*>(&vectors(lane / 4, which));
      const float2 values = __half22float2(pairs[warp]);
      float (&to)[2] = which == 0 ? scale : zero;
      to[0] = values.x;
      to[1] = values.y;
    }
  }
  // Masked tokens' values become `masked_scale` and 0, whatever they were.
  __device__ void mask(const bool (&is_masked)[2], float masked_scale) {
    for (int row = 0; row < 2; ++row) {
      if (!is_masked[row]) continue;
      scale[row] = masked_scale;
      zero[row] = 0.f;
    }
  }
};

// Raw sums of the chunk's 64 tokens from its words, begun: they are there after a wait.
template <Wgmma S>
__device__ void begin_scores(const KWords<S>& words, OperandB scaled, FragmentA (&tSrK)[S::tiles],
                             GroupTile<S>& tSrS) {
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) tSrK[k] = k_halves<S::page.k_bits>(words, k);
  fence<S>(tSrS);
  fence(tSrK);
  cute::warpgroup_fence_operand(scaled.low);  // descriptors are made here, not in front of loops
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
    multiply_group<S>(tSrS, tSrK[k], descriptor_b<S>(scaled, k), k > 0);
  }
  cute::warpgroup_commit_batch();
}

// The scores that were begun are there. Those of masked tokens are -inf.
template <Wgmma S>
__device__ void end_scores(const bool (&is_masked)[2], int begin, GroupTile<S>& tSrS) {
  cute::warpgroup_wait<0>();
  fence<S>(tSrS);
  if (begin <= 0) return;
#pragma unroll
  for (int d = 0; d < GroupShape<S>::accumulators; ++d) {
    if (is_masked[d / 2 % 2]) tSrS.d[d] = -INFINITY;
  }
}

// Per-token K: scales multiply the sums; query sums times zero-points join a column's offset.
struct TokenAxis {
  TokenPair tokens;

  __device__ float sum(float raw, int row) const { return raw * tokens.scale[row]; }
  __device__ float offset(float offset, float query_sum, int row) const {
    return query_sum * tokens.zero[row] + offset;
  }
};
struct ChannelAxis {
  static __device__ float sum(float raw, int) { return raw; }
  static __device__ float offset(float offset, float, int) { return offset; }
};

// A chunk's tokens, as far as they are a lane's.
template <class Axis>
struct LaneTokens {
  Axis axis;
  TokenPair v;
  bool is_masked[2];
};

}  // namespace bitdecoding::decode
