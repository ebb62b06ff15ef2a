// SPDX-License-Identifier: Apache-2.0
// docs/format.md, sections 2 to 5, once more: a page record from numbers, one scalar at a time.
// Rounds to fp16 in double arithmetic and places bytes by PageReader; shares nothing with the
// library but KvFormat.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "page_reader.hpp"

namespace bitdecoding::test {

// The nearest fp16, ties to even; beyond 65504 saturated.
inline float rn16(float x) {
  if (std::isnan(x)) return x;
  if (std::abs(x) > 65504.f) return std::copysign(65504.f, x);
  const int exponent = x == 0.f ? -14 : std::max(-14, std::ilogb(x));
  const double step = std::ldexp(1., exponent - 10);
  return static_cast<float>(std::nearbyint(double{x} / step) * step);
}

inline std::uint16_t fp16_bits(float x) {
  if (std::isnan(x)) return 0x7fff;
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::abs(double{x});
  if (size < 0x1p-14) return static_cast<std::uint16_t>(sign | static_cast<int>(size * 0x1p24));
  const int exponent = std::ilogb(size);
  const int mantissa = static_cast<int>(std::ldexp(size, 10 - exponent)) - 1024;
  return static_cast<std::uint16_t>(sign | (exponent + 15) << 10 | mantissa);
}

// A row of one head's K or V as a cache holds it, fp16; `mean`: (D) or nullptr.
inline void arrive(float* row, int head_dim, const float* mean, int rotation) {
  for (int c = 0; c < head_dim; ++c) row[c] = rn16(row[c]) - (mean == nullptr ? 0.f : mean[c]);
  for (int distance = 1; distance < rotation; distance *= 2) {
    for (int c = 0; c < head_dim; ++c) {
      if ((c & distance) != 0) continue;
      const float a = row[c], b = row[c + distance];
      row[c] = a + b;
      row[c + distance] = a - b;
    }
  }
  const float scale =
      rotation == 0 ? 1.f : static_cast<float>(1. / std::sqrt(static_cast<double>(rotation)));
  for (int c = 0; c < head_dim; ++c) row[c] = rn16(row[c] * scale);
}

class ReferencePage {
 public:
  // `k`, `v`: (P, D) of any size; the first `free_tokens` don't widen channel-axis K ranges.
  ReferencePage(const KvFormat& format, int free_tokens, std::vector<float> k, std::vector<float> v,
                const float* k_mean = nullptr)
      : f_(format), at_{format}, bytes(static_cast<std::size_t>(at_.page_bytes())) {
    for (int token = 0; token < f_.page_tokens; ++token) {
      arrive(&k[static_cast<std::size_t>(token * f_.head_dim)], f_.head_dim, k_mean, f_.k_rotation);
      arrive(&v[static_cast<std::size_t>(token * f_.head_dim)], f_.head_dim, nullptr,
             f_.v_rotation);
    }
    if (f_.token_norm) divide_by_norms(k);
    const bool per_channel = f_.k_axis == KAxis::channel;
    const int k_tokens = per_channel ? f_.k_group : 1, k_channels = per_channel ? 1 : f_.k_group;
    const auto k_groups =
        groups_of(k, k_tokens, k_channels, per_channel ? free_tokens : 0, {f_.k_bits, f_.k_clip});
    const auto v_groups = groups_of(v, 1, f_.v_group, 0, {f_.v_bits, f_.v_clip});
    for (int token = 0; token < f_.page_tokens; ++token) {
      for (int channel = 0; channel < f_.head_dim; ++channel) {
        const Group& key = k_groups[static_cast<std::size_t>(
            token / k_tokens * (f_.head_dim / k_channels) + channel / k_channels)];
        put_code(at_.k_place(token, channel), code(value(k, token, channel), key, f_.k_bits));
        if (at_.blocks()) {
          put_exponent(at_.k_exponent(token, channel), key.scale);
        } else {
          put_fp16(at_.k_scale(token, channel), key.scale);
          put_fp16(at_.k_zero(token, channel), key.zero);
        }
        const Group& val = v_groups[static_cast<std::size_t>(token * (f_.head_dim / f_.v_group) +
                                                             channel / f_.v_group)];
        put_code(at_.v_place(token, channel), code(value(v, token, channel), val, f_.v_bits));
        if (at_.blocks()) {
          put_exponent(at_.v_exponent(token, channel), val.scale);
        } else {
          put_fp16(at_.v_scale(token, channel), val.scale);
          put_fp16(at_.v_zero(token, channel), val.zero);
        }
      }
    }
  }

 private:
  struct Group {
    float scale, zero;
  };
  struct Width {
    int bits, clip;
  };

  float value(const std::vector<float>& x, int token, int channel) const {
    return x[static_cast<std::size_t>(token * f_.head_dim + channel)];
  }

  void divide_by_norms(std::vector<float>& k) {
    for (int token = 0; token < f_.page_tokens; ++token) {
      float sums[32] = {};
      for (int c = 0; c < f_.head_dim; ++c) {
        const float square = value(k, token, c) * value(k, token, c);
        sums[c % 32] += square;
      }
      for (int width : {16, 8, 4, 2, 1}) {
        for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
      }
      const float norm = rn16(std::sqrt(sums[0]));
      put_fp16(at_.norm(token), norm);
      const float inverse = norm == 0.f ? 0.f : 1.f / norm;
      for (int c = 0; c < f_.head_dim; ++c) {
        float& x = k[static_cast<std::size_t>(token * f_.head_dim + c)];
        x = rn16(x * inverse);
      }
    }
  }

  // Groups of `tokens` x `channels`, the channels of a run of tokens following one another.
  std::vector<Group> groups_of(const std::vector<float>& x, int tokens, int channels,
                               int free_tokens, Width width) const {
    std::vector<Group> groups;
    for (int token = 0; token < f_.page_tokens; token += tokens) {
      for (int channel = 0; channel < f_.head_dim; channel += channels) {
        groups.push_back(group_of(x, token, tokens, channel, channels, free_tokens, width));
      }
    }
    return groups;
  }

  Group group_of(const std::vector<float>& x, int token, int tokens, int channel, int channels,
                 int free_tokens, Width width) const {
    float low = INFINITY, high = -INFINITY;
    for (int n = std::max(token, free_tokens); n < token + tokens; ++n) {
      for (int c = channel; c < channel + channels; ++c) {
        const float element = value(x, n, c);
        if (std::isnan(element)) return {NAN, NAN};
        low = std::min(low, element);
        high = std::max(high, element);
      }
    }
    if (low > high) return {0.f, 0.f};
    if (at_.blocks()) return block_of(std::max(std::abs(low), std::abs(high)), width.bits);
    const float all = high - low, margin = static_cast<float>(100 - width.clip) * 0.005f;
    const float rounded = rn16(std::fma(all, margin, low));
    const float zero = rounded == 0.f ? 0.f : rounded;
    const float top = static_cast<float>((1 << width.bits) - 1);
    const float step = (std::fma(-all, margin, high) - zero) / top;
    return {rn16(step > 0.f ? step : 0.f), zero};  // +0 here too
  }

  static Group block_of(float largest, int bits) {
    if (largest == 0.f) return {0.f, 0.f};
    int e = -14;
    while (largest > std::ldexp(bits == 2 ? 3.5 : 10., e)) ++e;
    const float scale = std::ldexp(1.f, e);
    return {scale, scale * (bits == 2 ? -1.5f : -7.5f)};
  }

  static int code(float x, const Group& group, int bits) {
    if (std::isnan(group.scale) || group.scale == 0.f) return 0;
    const float inverse = 1.f / group.scale;
    const float place = (x - group.zero) * inverse;
    if (!(place > 0.f)) return 0;
    return static_cast<int>(std::min(std::nearbyint(place), static_cast<float>((1 << bits) - 1)));
  }

  void put_code(CodePlace place, int code) {
    auto& byte = bytes[static_cast<std::size_t>(place.byte)];
    byte = static_cast<std::uint8_t>(byte | code << place.bit);
  }
  void put_exponent(int at, float scale) {
    const int exponent = std::isnan(scale) ? 31 : scale == 0.f ? 0 : std::ilogb(scale) + 15;
    bytes[static_cast<std::size_t>(at)] = static_cast<std::uint8_t>(exponent);
  }
  void put_fp16(int at, float x) {
    const std::uint16_t bits = fp16_bits(x);
    bytes[static_cast<std::size_t>(at)] = static_cast<std::uint8_t>(bits);
    bytes[static_cast<std::size_t>(at) + 1] = static_cast<std::uint8_t>(bits >> 8);
  }

  KvFormat f_;
  PageReader at_;

 public:
  std::vector<std::uint8_t> bytes;
};

}  // namespace bitdecoding::test
