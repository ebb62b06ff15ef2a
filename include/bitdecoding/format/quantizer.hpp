// SPDX-License-Identifier: Apache-2.0
// The scalar quantiser: the definition that every back end reproduces bit for bit.
//   value ~ code * scale + zero      code in [0, 2^bits - 1]; scale, zero fp16, one pair per group
// All arithmetic is IEEE fp32, round to nearest. Products are exact or not added to (fusing them
// into a sum changes nothing), or fused by name, and no fp32 subnormal arises (nor does flushing them). Asymmetric as
// in the BitDecoding paper, with NaN, overflow, constant groups and first tokens made exact.
//   blocks (KAxis::block)      value ~ (code - 7.5) * 2^e, 2 bits: (code - 1.5) * 2^e
// are the same with scale = 2^e, zero = -7.5 * 2^e or -1.5 * 2^e; one byte stands for both. Magnitudes
// beyond the last code are clamped: up to 10 * 2^e instead of 8 * 2^e, or 3.5 instead of 2. Over
// blocks of 32 Gaussian values that leaves 77% (4 bits) and 50% (2 bits) of the mean squared error
// without; Laplace, Student t and Hadamard-rotated ones fare alike, and no other clip much better.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "bitdecoding/format/float16.hpp"
#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::format {

// Scale and zero-point of one group, as fp16 bits.
struct GroupParameters {
  std::uint16_t scale = 0;
  std::uint16_t zero = 0;

  friend constexpr bool operator==(const GroupParameters&, const GroupParameters&) = default;
};

// Smallest and largest value of a group; an empty group (first tokens only) stays empty.
struct GroupRange {
  float low = INFINITY;
  float high = -INFINITY;
  bool has_nan = false;

  constexpr void include(float value) {
    low = value < low ? value : low;
    high = value > high ? value : high;
    has_nan = has_nan || value != value;
  }
  constexpr void include(const GroupRange& other) {
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
    has_nan = has_nan || other.has_nan;
  }
};

// What a clip (KvFormat::k_clip, v_clip; percent) takes off each end of a range, as a share of it.
constexpr float clip_margin(int clip) { return static_cast<float>(100 - clip) * 0.005f; }

// Of the range without `margin` of its width at either end: zero = rn16(low), scale = rn16((high -
// zero) / max_code). An empty group gives zeros; a NaN makes both NaN; -0 is stored as +0, because
// the order of a minimum must not show in the bytes.
constexpr GroupParameters group_parameters(const GroupRange& range, int bits, float margin = 0.f) {
  if (range.has_nan) return {kFp16NaN, kFp16NaN};
  if (range.low > range.high) return {};
  // Fused by name: a compiler may not choose.
  const float width = range.high - range.low;
  const float low = __builtin_fmaf(width, margin, range.low);
  const float high = __builtin_fmaf(-width, margin, range.high);
  const std::uint16_t rounded = fp16_from_float(low);
  const std::uint16_t zero = rounded == 0x8000u ? std::uint16_t{0} : rounded;
  const float step = (high - float_from_fp16(zero)) / static_cast<float>(max_code(bits));
  return {fp16_from_float(step > 0.f ? step : 0.f), zero};
}

// What a group's parameters turn into before its values are coded: r = 1 / scale, 0 for scale 0.
struct GroupCoder {
  float zero = 0.f;
  float inverse_scale = 0.f;

  GroupCoder() = default;
  constexpr explicit GroupCoder(const GroupParameters& p) : zero(float_from_fp16(p.zero)) {
    const float scale = float_from_fp16(p.scale);
    if (scale > 0.f) inverse_scale = 1.f / scale;
  }

  // clamp(rint((value - zero) * r), 0, max_code), ties to even; NaN gives 0.
  constexpr std::uint32_t code(float value, int bits) const {
    const float top = static_cast<float>(max_code(bits));
    const float scaled = (value - zero) * inverse_scale;
    const float positive = scaled > 0.f ? scaled : 0.f;
    const float clamped = positive < top ? positive : top;
    // Adding 1.5 * 2^23 leaves the rounded integer in the low mantissa bits.
    return std::bit_cast<std::uint32_t>(clamped + 12582912.f) & 0xffu;
  }
};

// ---- blocks (KAxis::block) ----

// The exponent field of the fp16 number 2^e, 1..30; of the others, all values 0 or one of them NaN:
inline constexpr std::uint8_t kZeroBlock = 0, kNaNBlock = 31;

// Where the code of 0 would be: between the two in the middle.
constexpr float block_middle(int bits) { return bits == 2 ? 1.5f : 7.5f; }
// The largest magnitude of a block with e = 0.
constexpr float block_limit(int bits) { return bits == 2 ? 3.5f : 10.f; }

// The smallest e with largest <= block_limit * 2^e, at least -14 (and never above 15: see fp16).
constexpr std::uint8_t block_exponent(const GroupRange& range, int bits) {
  if (range.has_nan) return kNaNBlock;
  const float largest = -range.low > range.high ? -range.low : range.high;
  if (!(largest > 0.f)) return kZeroBlock;
  // Patterns of positive floats are ordered, and an octave is 2^23 of them.
  constexpr int kOctave = 1 << 23;
  const int above = std::bit_cast<std::int32_t>(largest) -
                    std::bit_cast<std::int32_t>(block_limit(bits)) + kOctave - 1;
  const int e = above >> 23;  // rounds down
  return static_cast<std::uint8_t>((e > -14 ? e : -14) + 15);
}

constexpr GroupParameters block_parameters(std::uint8_t exponent, int bits) {
  if (exponent == kZeroBlock) return {};
  if (exponent == kNaNBlock) return {kFp16NaN, kFp16NaN};
  const auto scale = static_cast<std::uint16_t>(exponent << 10);
  return {scale, fp16_from_float(-block_middle(bits) * float_from_fp16(scale))};
}

constexpr float dequantize(std::uint32_t code, const GroupParameters& p) {
  return static_cast<float>(code) * float_from_fp16(p.scale) + float_from_fp16(p.zero);
}

// ---- token norms (KvFormat::token_norm) ----

// Partial sums a norm is made of: channel c goes to sum c % kNormSums in rising order of c, then
// sums are halved pairwise (i and i + 16, i + 8, ...): the order a warp's butterfly adds in.
inline constexpr int kNormSums = 32;

constexpr std::uint16_t token_norm_from_sums(float (&sums)[kNormSums]) {
  for (int width = kNormSums / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return fp16_from_float(std::sqrt(sums[0]));
}

// rn16 of the Euclidean norm of one token's K of one head; `k` yields channel c as a float.
template <class Channels>
constexpr std::uint16_t token_norm(const Channels& k, int head_dim) {
  float sums[kNormSums] = {};
  for (int c = 0; c < head_dim; ++c) {
    const float value = k(c);
    sums[c % kNormSums] += value * value;
  }
  return token_norm_from_sums(sums);
}

// K as it is coded where the format has token norms: rn16(k * (1 / norm)), 0 for a zero token.
// Both arguments and the result are fp16 bits; the quantiser sees nothing but fp16 values.
constexpr std::uint16_t normalized_key(std::uint16_t k, std::uint16_t norm) {
  const float length = float_from_fp16(norm);
  const float inverse = length != 0.f ? 1.f / length : 0.f;
  return fp16_from_float(float_from_fp16(k) * inverse);
}

}  // namespace bitdecoding::format
