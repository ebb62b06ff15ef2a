// SPDX-License-Identifier: Apache-2.0
// PageConfig: the part of a KvFormat that kernels fix at compile time. Group sizes, page size and
// token norms stay run time.
#pragma once

#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::layout {

// Sizes of the largest legal format: what fixed buffers must hold.
inline constexpr int kMaxPageTokens = 128;
inline constexpr int kMaxHeadDim = 256;

struct PageConfig {
  int k_bits = 4;
  int v_bits = 4;
  KAxis k_axis = KAxis::channel;
  int head_dim = 128;

  constexpr bool has_blocks() const { return k_axis == KAxis::block; }
  friend constexpr bool operator==(const PageConfig&, const PageConfig&) = default;
};

constexpr PageConfig page_config(const KvFormat& f) {
  return {f.k_bits, f.v_bits, f.k_axis, f.head_dim};
}

}  // namespace bitdecoding::layout
