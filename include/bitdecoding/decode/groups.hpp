// SPDX-License-Identifier: Apache-2.0
// The quantisation groups that a chunk meets. Group sizes are run-time values; the common case, one
// group per token or channel and chunk, gets straight-line code of its own.
#pragma once

#include <algorithm>

#include "bitdecoding/layout/page_config.hpp"

namespace bitdecoding::decode {

// K per channel: groups of 64 tokens or more. K per token, and V: one group per token, or, at
// head_dim 256, two. No norms.
template <int HeadDim>
struct WholeGroups {
  static constexpr int kMostChunkGroups = 1;  // channel-axis K groups that a chunk meets
  static constexpr int kGroupChannels = std::min(HeadDim, kMostGroupChannels);
  static constexpr int kMostValueGroups = HeadDim / kGroupChannels;  // V groups of a token
  static constexpr int chunk_groups() { return 1; }
  static constexpr int k_token_group() { return kGroupChannels; }
  static constexpr int v_group() { return kGroupChannels; }
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
  const int channels = std::min(f.head_dim, kMostGroupChannels);
  const bool whole_k =
      f.k_axis == KAxis::channel ? f.k_group >= kChunkTokens : f.k_group == channels;
  return whole_k && f.v_group == channels && !f.token_norm;
}

}  // namespace bitdecoding::decode
