// SPDX-License-Identifier: Apache-2.0
// Every legal KvFormat without clips, from the rules as docs/format.md words them, not from `why_invalid`.
#pragma once

#include <algorithm>
#include <vector>

#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::test {

inline std::vector<KvFormat> legal_formats() {
  std::vector<KvFormat> all;
  const auto add_k_groups = [&all](KvFormat f, KAxis axis, int longest) {
    f.k_axis = axis;
    for (f.k_group = 32; f.k_group <= longest; f.k_group *= 2) {
      for (f.k_bits = 2; f.k_bits <= 4; f.k_bits += 2) {
        for (f.v_bits = 2; f.v_bits <= 4; f.v_bits += 2) {
          for (const bool norm : {false, true}) {
            if (norm && axis == KAxis::block) continue;
            f.token_norm = norm;
            all.push_back(f);
          }
        }
      }
    }
  };
  KvFormat f;
  for (f.head_dim = 64; f.head_dim <= 256; f.head_dim *= 2) {
    for (f.page_tokens = 64; f.page_tokens <= 128; f.page_tokens *= 2) {
      for (f.v_group = 32; f.v_group <= std::min(f.head_dim, 128); f.v_group *= 2) {
        add_k_groups(f, KAxis::channel, f.page_tokens);
        add_k_groups(f, KAxis::token, std::min(f.head_dim, 128));
      }
      f.v_group = 32;
      add_k_groups(f, KAxis::block, 32);
    }
  }
  return all;
}

// The same; those that may have clips take turns with them.
inline std::vector<KvFormat> clipped_formats() {
  std::vector<KvFormat> all = legal_formats();
  int turn = 0;
  for (KvFormat& f : all) {
    if (f.k_axis == KAxis::block) continue;
    constexpr int kClips[] = {100, 85, 50, 77, 99};
    f.k_clip = kClips[turn % 5];
    f.v_clip = kClips[++turn * 3 % 5];
  }
  return all;
}

}  // namespace bitdecoding::test
