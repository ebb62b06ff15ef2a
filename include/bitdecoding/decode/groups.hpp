// SPDX-License-Identifier: Apache-2.0
// The quantisation groups that a chunk meets. Group sizes are run-time values; the common case, one
// group per token or channel and chunk, gets straight-line code of its own.
#pragma once

#include "bitdecoding/layout/page_config.hpp"

namespace bitdecoding::decode {

// K per channel: groups of 64 tokens or more. K per token, and V: one group per token. No norms.
template <int HeadDim>
struct WholeGroups {
  static constexpr int kMostChunkGroups = 1;  // channel-axis K groups that a chunk meets
  static constexpr int kMostValueGroups = 1;  // V groups of a token
  static constexpr int chunk_groups() { return 1; }
  static constexpr int k_token_group() { return HeadDim; }
  static constexpr int v_group() { return HeadDim; }
  static constexpr bool token_norm() { return false; }
};

// Blocks of 32 channels of K and V.
struct BlockGroups {
  static constexpr int kMostChunkGroups = 1;
  static constexpr int kMostValueGroups = layout::kMaxHeadDim / 32;
  static constexpr int v_group() { return 32; }
  static constexpr bool token_norm() { return false; }
};

struct AnyGroups {
  const KvFormat& format;

  static constexpr int kMostChunkGroups = 2;
  static constexpr int kMostValueGroups = layout::kMaxHeadDim / 32;
  constexpr int chunk_groups() const { return format.k_group < kChunkTokens ? 2 : 1; }
  constexpr int k_token_group() const { return format.k_group; }
  constexpr int v_group() const { return format.v_group; }
  constexpr bool token_norm() const { return format.token_norm; }
};

constexpr bool has_whole_groups(const KvFormat& f) {
  const bool whole_k =
      f.k_axis == KAxis::channel ? f.k_group >= kChunkTokens : f.k_group == f.head_dim;
  return whole_k && f.v_group == f.head_dim && !f.token_norm;
}

}  // namespace bitdecoding::decode
