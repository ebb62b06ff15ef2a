// SPDX-License-Identifier: Apache-2.0
// Every legal KvFormat, from the rules as docs/format.md words them, not from `why_invalid`.
// Rotations and clips don't move a byte: every pair of rotations stands with one other format, not
// with all, and clips take turns.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::test {

inline bool is_legal_rotation(int block, int head_dim) {
  return block == 0 || ((block == 16 || block == 64 || block == 128) && block <= head_dim);
}

// Without rotations.
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

// Every pair of rotations but none and none.
inline std::vector<KvFormat> rotated_formats() {
  const std::vector<KvFormat> bases = clipped_formats();
  std::vector<KvFormat> all;
  std::size_t next = 0;
  for (const int head_dim : {64, 128, 256}) {
    for (const int k : {0, 16, 64, 128}) {
      for (const int v : {0, 16, 64, 128}) {
        if (!is_legal_rotation(k, head_dim) || !is_legal_rotation(v, head_dim)) continue;
        if (k == 0 && v == 0) continue;
        do {
          next = (next + 67) % bases.size();
        } while (bases[next].head_dim != head_dim);
        KvFormat f = bases[next];
        f.k_rotation = k;
        f.v_rotation = v;
        all.push_back(f);
      }
    }
  }
  return all;
}

inline std::vector<KvFormat> all_formats() {
  std::vector<KvFormat> all = clipped_formats();
  for (const KvFormat& f : rotated_formats()) all.push_back(f);
  return all;
}

}  // namespace bitdecoding::test
