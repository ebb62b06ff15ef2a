// SPDX-License-Identifier: Apache-2.0
// From a run-time KvFormat to the compile-time PageConfig of its pages, once per call.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include "bitdecoding/layout/page_config.hpp"

namespace bitdecoding::cpu {

inline constexpr std::array kPageConfigs = [] {
  std::array<layout::PageConfig, 36> configs{};
  std::size_t i = 0;
  for (const int head_dim : {64, 128, 256}) {
    for (const KAxis axis : {KAxis::channel, KAxis::token, KAxis::block}) {
      for (const int k_bits : {2, 4}) {
        for (const int v_bits : {2, 4}) configs[i++] = {k_bits, v_bits, axis, head_dim};
      }
    }
  }
  return configs;
}();

// Calls visit.operator()<config>() for the format's config.
template <class Visit>
void with_page_config(const KvFormat& format, const Visit& visit) {
  const layout::PageConfig wanted = layout::page_config(format);
  const auto try_config = [&]<std::size_t I>() {
    const bool found = kPageConfigs[I] == wanted;
    if (found) visit.template operator()<kPageConfigs[I]>();
    return found;
  };
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    (void)(try_config.template operator()<I>() || ...);
  }(std::make_index_sequence<kPageConfigs.size()>());
}

}  // namespace bitdecoding::cpu
