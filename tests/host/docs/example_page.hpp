// SPDX-License-Identifier: Apache-2.0
// The pages of the worked example in docs/format.md, packed through the layouts and the quantiser.
#pragma once

#include <cstdint>
#include <vector>

#include "bitdecoding/format/quantizer.hpp"
#include "bitdecoding/format/rotation.hpp"
#include "bitdecoding/layout/packed_kv_tensor.hpp"

namespace bitdecoding::test {

inline float example_k(int token, int channel) {
  const int whole = (13 * token + 29 * channel + token * channel) % 251 - 125;
  return static_cast<float>(whole) / 8 * (token < 4 ? 16 : 1);
}
inline float example_v(int token, int channel) {
  return static_cast<float>((7 * token + 31 * channel + 3 * token * channel) % 127 - 63) / 16;
}

// Values (P,D) as they arrive.
inline std::vector<float> arrived(const KvFormat& f, int rotation, auto&& value) {
  std::vector<float> rows;
  for (int token = 0; token < f.page_tokens; ++token) {
    std::vector<std::uint16_t> row;
    for (int channel = 0; channel < f.head_dim; ++channel) {
      row.push_back(format::fp16_from_float(value(token, channel)));
    }
    format::transform({rotation, nullptr}, row.data(), f.head_dim);
    for (const std::uint16_t bits : row) rows.push_back(format::float_from_fp16(bits));
  }
  return rows;
}

// K as it is coded; stores the norms where the format has them.
template <class Page>
std::vector<float> coded_k(const KvFormat& f, const Page& page) {
  std::vector<float> k = arrived(f, f.k_rotation, example_k);  // (P,D)
  for (int token = 0; f.token_norm && token < f.page_tokens; ++token) {
    float* row = &k[token * f.head_dim];
    const auto norm = format::token_norm([&](int channel) { return row[channel]; }, f.head_dim);
    page.token_norms()(token) = cutlass::half_t::bitcast(norm);
    for (int channel = 0; channel < f.head_dim; ++channel) {
      const std::uint16_t bits = format::fp16_from_float(row[channel]);
      row[channel] = format::float_from_fp16(format::normalized_key(bits, norm));
    }
  }
  return k;
}

// Codes a group of tokens x channels that begins at (token0, channel0).
template <int Bits>
void code_group(auto&& value, auto codes, auto scales, auto zeros, int token0, int tokens,
                int channel0, int channels, int keep_first) {
  format::GroupRange range;
  for (int token = token0; token < token0 + tokens; ++token) {
    for (int channel = channel0; channel < channel0 + channels; ++channel) {
      if (token >= keep_first) range.include(value(token, channel));
    }
  }
  const format::GroupParameters p = format::group_parameters(range, Bits);
  scales(token0, channel0) = cutlass::half_t::bitcast(p.scale);
  zeros(token0, channel0) = cutlass::half_t::bitcast(p.zero);
  const format::GroupCoder coder(p);
  for (int token = token0; token < token0 + tokens; ++token) {
    for (int channel = channel0; channel < channel0 + channels; ++channel) {
      codes(token, channel) = layout::Code<Bits>(coder.code(value(token, channel), Bits));
    }
  }
}

template <layout::PageConfig C>
void pack_example(const KvFormat& f, int keep_first, std::uint8_t* bytes) {
  const layout::PackedKvPage<C> page(layout::PageRecord(f), bytes);
  const std::vector<float> k = coded_k(f, page), v = arrived(f, f.v_rotation, example_v);
  const auto k_at = [&](int token, int channel) { return k[token * f.head_dim + channel]; };
  const auto v_at = [&](int token, int channel) { return v[token * f.head_dim + channel]; };
  const bool per_channel = f.k_axis == KAxis::channel;
  const int tokens = per_channel ? f.k_group : 1, channels = per_channel ? 1 : f.k_group;
  for (int token = 0; token < f.page_tokens; token += tokens) {
    for (int channel = 0; channel < f.head_dim; channel += channels) {
      code_group<C.k_bits>(k_at, page.k_codes(), page.k_scales(), page.k_zeros(), token, tokens,
                           channel, channels, per_channel ? keep_first : 0);
    }
  }
  for (int token = 0; token < f.page_tokens; ++token) {
    for (int channel = 0; channel < f.head_dim; channel += f.v_group) {
      code_group<C.v_bits>(v_at, page.v_codes(), page.v_scales(), page.v_zeros(), token, 1, channel,
                           f.v_group, 0);
    }
  }
}

// CRC-32 as zlib computes it.
inline std::uint32_t crc32(const std::uint8_t* bytes, int count) {
  std::uint32_t crc = 0xffffffffu;
  for (int i = 0; i < count; ++i) {
    crc ^= bytes[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0u);
  }
  return ~crc;
}

}  // namespace bitdecoding::test
