// SPDX-License-Identifier: Apache-2.0
// An independent reader of page records: the formulas of docs/format.md as arithmetic on bytes,
// sharing nothing with include/bitdecoding/layout. Tests hold the CuTe layouts against it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::test {

// Where one code lies: `byte` counts from the start of the record, `bit` from the byte's lowest.
struct CodePlace {
  int byte;
  int bit;
};

struct PageReader {
  KvFormat f;
  const std::uint8_t* bytes = nullptr;

  // ---- sections of chunk c, bytes from the start of the record ----
  bool per_channel() const { return f.k_axis == KAxis::channel; }
  bool blocks() const { return f.k_axis == KAxis::block; }
  int groups_before(int c) const {
    return per_channel() ? (64 * c + f.k_group - 1) / f.k_group : 0;
  }
  int groups_in(int c) const { return groups_before(c + 1) - groups_before(c); }
  int group_bytes() const { return blocks() ? 64 : 256; }  // of a group of channels, 64 tokens
  int k_token_bytes() const { return per_channel() ? 0 : group_bytes() * (f.head_dim / f.k_group); }
  int v_parameter_bytes() const { return group_bytes() * (f.head_dim / f.v_group); }
  int chunk(int c) const {
    const int every_chunk = 8 * f.head_dim * (f.k_bits + f.v_bits) + v_parameter_bytes() +
                            k_token_bytes() + (f.token_norm ? 128 : 0);
    return groups_before(c) * 4 * f.head_dim + c * every_chunk;
  }
  int k_codes(int c) const { return chunk(c) + groups_in(c) * 4 * f.head_dim; }
  int v_codes(int c) const { return k_codes(c) + 8 * f.head_dim * f.k_bits; }
  int v_parameters(int c) const { return v_codes(c) + 8 * f.head_dim * f.v_bits; }
  int k_token_parameters(int c) const { return v_parameters(c) + v_parameter_bytes(); }
  int token_norms(int c) const { return k_token_parameters(c) + k_token_bytes(); }
  int page_bytes() const { return chunk(f.page_tokens / 64); }

  // ---- codes ----
  CodePlace k_place(int token, int channel) const {
    const int block = token % 64 / 16, r = token % 16 / 8, g = token % 8;
    const int span = channel / 64, p = channel % 64 / 32, q = channel % 32 / 16;
    const int u = channel % 16 / 8, t = channel % 8 / 2, h = channel % 2, lane = 4 * g + t;
    const int word = f.k_bits == 2 ? 2 * span + r : 4 * span + 2 * q + r;  // in block and lane
    const int field = f.k_bits == 2 ? p + 2 * q : p;
    const int words = f.head_dim * f.k_bits / 64, unit = words < 4 ? words : 4;
    const int position = ((block * (words / unit) + word / unit) * 32 + lane) * unit + word % unit;
    return {k_codes(token / 64) + 4 * position + 2 * h + u, field * f.k_bits};
  }
  CodePlace v_place(int token, int channel) const {
    const int fields = 8 / f.v_bits, words = f.head_dim / (8 * fields),
              parts = std::max(words < 4 ? words : 4, f.head_dim / 32);
    const int block = token % 64 / 16, u = token % 16 / 8, t = token % 8 / 2, h = token % 2;
    const int word = channel / (8 * fields), field = channel / 8 % fields, g = channel % 8;
    const int lane = 4 * g + t, part_words = words / parts, part = word / part_words;
    const int nth = block * part_words + word % part_words;  // of this lane's words in the part
    const int position = ((part * part_words + nth / 4) * 32 + lane) * 4 + nth % 4;
    return {v_codes(token / 64) + 4 * position + 2 * h + u, field * f.v_bits};
  }
  std::uint32_t code(CodePlace place, int bits) const {
    return bytes[place.byte] >> place.bit & ((1u << bits) - 1);
  }

  // ---- parameters: byte offsets of fp16 values ----
  int token_plane(int section, int plane, int token) const {
    return section + 128 * plane + 2 * (8 * (token % 8) + token % 64 / 8);
  }
  int k_scale(int token, int channel) const {
    if (!per_channel()) {
      return token_plane(k_token_parameters(token / 64), 2 * (channel / f.k_group), token);
    }
    const int group = token / f.k_group, c = group * f.k_group / 64;
    const int i = channel / 8, t = channel % 8 / 2, h = channel % 2;
    return chunk(c) + (group - groups_before(c)) * 4 * f.head_dim +
           2 * (t * f.head_dim / 4 + 2 * i + h);
  }
  int k_zero(int token, int channel) const {
    return k_scale(token, channel) + (per_channel() ? 2 * f.head_dim : 128);
  }
  int v_scale(int token, int channel) const {
    return token_plane(v_parameters(token / 64), 2 * (channel / f.v_group), token);
  }
  int v_zero(int token, int channel) const { return v_scale(token, channel) + 128; }
  // Of blocks, which have neither scales nor zeros: a byte.
  int exponent_plane(int section, int block, int token) const {
    return section + 64 * block + 8 * (token % 8) + token % 64 / 8;
  }
  int k_exponent(int token, int channel) const {
    return exponent_plane(k_token_parameters(token / 64), channel / 32, token);
  }
  int v_exponent(int token, int channel) const {
    return exponent_plane(v_parameters(token / 64), channel / 32, token);
  }
  int norm(int token) const { return token_plane(token_norms(token / 64), 0, token); }

  std::uint16_t fp16(int offset) const {
    return static_cast<std::uint16_t>(bytes[offset] | bytes[offset + 1] << 8);
  }
};

}  // namespace bitdecoding::test
