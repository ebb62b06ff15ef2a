// SPDX-License-Identifier: Apache-2.0
#include "cpu/encode.hpp"

#include "cpu/instruction_sets.hpp"
#include "cpu/token_tile.hpp"

namespace bitdecoding::cpu {
namespace {

// Loops over this many neighbours become vector instructions.
constexpr int kRun = 32;

template <int Bits, class CoderOf>
BITDECODING_INLINE void encode(const std::uint16_t* values, int count, const CoderOf& coder_of,
                               std::uint8_t* bytes) {
  constexpr int kFields = 8 / Bits;
  for (int word = 0; word < count / (8 * kFields); ++word) {
    const int first = 8 * kFields * word;
    std::uint32_t codes[8 * kFields];
    for (int i = 0; i < 8 * kFields; ++i) {
      codes[i] = coder_of(first + i).code(format::float_from_fp16(values[first + i]), Bits);
    }
    for (int x = 0; x < 8; ++x) {
      std::uint32_t byte = 0;
      for (int f = 0; f < kFields; ++f) byte |= codes[8 * f + x] << (f * Bits);
      bytes[8 * word + x] = static_cast<std::uint8_t>(byte);
    }
  }
}

}  // namespace

BITDECODING_CLONES
void channel_ranges(const std::uint16_t* rows, int tokens, int head_dim,
                    format::GroupRange* ranges) {
  float low[kMaxHeadDim];
  float high[kMaxHeadDim];
  std::uint32_t has_nan[kMaxHeadDim];
  for (int c = 0; c < head_dim; ++c) {
    low[c] = INFINITY;
    high[c] = -INFINITY;
    has_nan[c] = 0;
  }
  for (int n = 0; n < tokens; ++n) {
    for (int c = 0; c < head_dim; ++c) {
      const float value = format::float_from_fp16(rows[n * head_dim + c]);
      low[c] = value < low[c] ? value : low[c];
      high[c] = value > high[c] ? value : high[c];
      has_nan[c] |= value != value ? 1u : 0u;
    }
  }
  for (int c = 0; c < head_dim; ++c) ranges[c] = {low[c], high[c], has_nan[c] != 0};
}

BITDECODING_CLONES
format::GroupRange token_range(const std::uint16_t* values, int count) {
  float low[kRun];
  float high[kRun];
  std::uint32_t has_nan[kRun];
  for (int i = 0; i < kRun; ++i) {
    low[i] = INFINITY;
    high[i] = -INFINITY;
    has_nan[i] = 0;
  }
  for (int first = 0; first < count; first += kRun) {
    for (int i = 0; i < kRun; ++i) {
      const float value = format::float_from_fp16(values[first + i]);
      low[i] = value < low[i] ? value : low[i];
      high[i] = value > high[i] ? value : high[i];
      has_nan[i] |= value != value ? 1u : 0u;
    }
  }
  format::GroupRange range;
  for (int i = 0; i < kRun; ++i) range.include({low[i], high[i], has_nan[i] != 0});
  return range;
}

BITDECODING_CLONES
void encode_channels(const std::uint16_t* values, const format::GroupCoder* coders, int count,
                     int bits, std::uint8_t* bytes) {
  const auto coder_of = [coders](int c) -> const format::GroupCoder& { return coders[c]; };
  bits == 2 ? encode<2>(values, count, coder_of, bytes) : encode<4>(values, count, coder_of, bytes);
}

BITDECODING_CLONES
void encode_group(const std::uint16_t* values, const format::GroupCoder& coder, int count, int bits,
                  std::uint8_t* bytes) {
  const format::GroupCoder shared = coder;
  const auto coder_of = [&shared](int) -> const format::GroupCoder& { return shared; };
  bits == 2 ? encode<2>(values, count, coder_of, bytes) : encode<4>(values, count, coder_of, bytes);
}

}  // namespace bitdecoding::cpu
