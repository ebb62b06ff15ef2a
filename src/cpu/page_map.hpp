// SPDX-License-Identifier: Apache-2.0
// Where a page record keeps what decode reads, as byte offsets taken from the views of
// layout/packed_kv_tensor.hpp once per call, and the weights of the fields that codes come in.
// Chunks are 64 tokens, runs 32: the shortest K group.
#pragma once

#include <cstdint>

#include "bitdecoding/layout/packed_kv_tensor.hpp"
#include "cpu/code_kernels.hpp"
#include "cpu/page_dispatch.hpp"

namespace bitdecoding::cpu {

using layout::kMaxHeadDim;

struct PageMap {
  static constexpr int kRunTokens = 32;
  static constexpr int kChunks = 2;
  static constexpr int kRuns = 4;
  static constexpr int kGroups = kMaxVGroups;  // of channels

  // Scales, and zero-points at the same place of `zeros`; of blocks the exponents, twice.
  struct Parameters {
    int scales;
    int zeros;
  };
  int k_codes[kChunks];
  int v_codes[kChunks];
  int norms[kChunks];
  Parameters k_channels[kRuns];           // channel axis: the group that holds the run
  Parameters k_tokens[kChunks][kGroups];  // token axis
  Parameters v_tokens[kChunks][kGroups];

  float k_weights[kMaxHeadDim];  // lane order
  float v_weights[kMaxHeadDim];  // channel order
};

// Undoes the place of code `code` in its byte.
template <int Bits>
constexpr float field_weight(int code) {
  return 1.f / static_cast<float>(1 << code * Bits % 8);
}

template <layout::PageConfig Config>
PageMap map_page(const KvFormat& f, const std::uint8_t* bytes) {
  const layout::PackedKvPage<Config, const std::uint8_t> page(layout::PageRecord(f), bytes);
  const auto offset = [bytes](const auto& element) {
    return static_cast<int>(reinterpret_cast<const std::uint8_t*>(&element) - bytes);
  };
  const auto parameters = [&](const auto& scales, const auto& zeros, int token, int channel) {
    return PageMap::Parameters{offset(scales(token, channel)), offset(zeros(token, channel))};
  };
  PageMap map{};
  for (int c = 0; c < Config.head_dim; ++c) {
    map.k_weights[lane_order(c, Config.head_dim)] =
        field_weight<Config.k_bits>(layout::k_code_layout<Config.k_bits, Config.head_dim>()(0, c));
    map.v_weights[c] =
        field_weight<Config.v_bits>(layout::v_code_layout<Config.v_bits, Config.head_dim>()(0, c));
  }
  for (int chunk = 0; chunk < f.chunks(); ++chunk) {
    const int token = chunk * kChunkTokens;
    map.k_codes[chunk] = offset(page.k_units(chunk)(0, 0, 0));
    map.v_codes[chunk] = offset(page.v_units(chunk)(0, 0, 0));
    if (f.token_norm) map.norms[chunk] = offset(page.token_norms()(token));
    for (int group = 0; group < f.v_groups(); ++group) {
      const int channel = group * f.v_group;
      if constexpr (Config.has_blocks()) {
        map.k_tokens[chunk][group] =
            parameters(page.k_exponents(), page.k_exponents(), token, channel);
        map.v_tokens[chunk][group] =
            parameters(page.v_exponents(), page.v_exponents(), token, channel);
      } else {
        map.v_tokens[chunk][group] = parameters(page.v_scales(), page.v_zeros(), token, channel);
      }
    }
    if constexpr (Config.k_axis == KAxis::token) {
      for (int group = 0; group < f.k_groups(); ++group) {
        map.k_tokens[chunk][group] =
            parameters(page.k_scales(), page.k_zeros(), token, group * f.k_group);
      }
    }
  }
  if constexpr (Config.k_axis == KAxis::channel) {
    for (int run = 0; run < f.page_tokens / PageMap::kRunTokens; ++run) {
      map.k_channels[run] =
          parameters(page.k_scales(), page.k_zeros(), run * PageMap::kRunTokens, 0);
    }
  }
  return map;
}

// `bytes`: any record of the pool; only its address is used.
inline PageMap map_page(const KvFormat& format, const std::uint8_t* bytes) {
  PageMap map{};
  with_page_config(format,
                   [&]<layout::PageConfig Config>() { map = map_page<Config>(format, bytes); });
  return map;
}

}  // namespace bitdecoding::cpu
