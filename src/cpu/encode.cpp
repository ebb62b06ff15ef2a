// SPDX-License-Identifier: Apache-2.0
#include "cpu/encode.hpp"

#include <bit>

#include "cpu/instruction_sets.hpp"
#include "cpu/token_tile.hpp"
#include "cpu/vector8.hpp"

namespace bitdecoding::cpu {
namespace {

// format::GroupRange, eight at a time.
struct Range8 {
  Float8 low = Float8{} + INFINITY;
  Float8 high = Float8{} - INFINITY;
  Int8 has_nan{};

  BITDECODING_INLINE void include(const Float8& value) {
    low = value < low ? value : low;
    high = value > high ? value : high;
    has_nan |= value != value;
  }
  BITDECODING_INLINE format::GroupRange lane(int i) const {
    return {low[i], high[i], has_nan[i] != 0};
  }
};

// format::GroupCoder::code, eight at a time.
template <int Bits>
BITDECODING_INLINE void codes_of(const Float8& value, const Float8& zero, const Float8& inverse,
                                 UInt8& codes) {
  const Float8 top = Float8{} + static_cast<float>(format::max_code(Bits));
  const Float8 scaled = (value - zero) * inverse;
  const Float8 positive = scaled > 0.f ? scaled : Float8{};
  const Float8 clamped = positive < top ? positive : top;
  codes = (UInt8)(clamped + 12582912.f) & 0xffu;
}

// The first channel of field `field` of eight bytes.
template <int Bits, CodeOrder Order>
constexpr int first_channel(int eight, int field) {
  constexpr int kFields = 8 / Bits;
  if (Order == CodeOrder::v) return 8 * (kFields * eight + field);
  constexpr int kSpanEights = 8 / kFields;
  return 64 * (eight / kSpanEights) + 32 * (field % 2) + 16 * (field / 2) +
         8 * (eight % kSpanEights);
}

// load_coder(channel, zero, inverse) for eight channels.
template <int Bits, CodeOrder Order, class LoadCoder>
BITDECODING_INLINE void encode(const std::uint16_t* values, int head_dim,
                               const LoadCoder& load_coder, std::uint8_t* bytes) {
  using Byte8 = std::uint8_t __attribute__((vector_size(8)));
  constexpr int kFields = 8 / Bits;
  for (int eight = 0; eight < head_dim / (8 * kFields); ++eight) {
    UInt8 packed{};
    for (int f = 0; f < kFields; ++f) {
      const int channel = first_channel<Bits, Order>(eight, f);
      Float8 value, zero, inverse;
      UInt8 codes;
      load_fp16(values + channel, value);
      load_coder(channel, zero, inverse);
      codes_of<Bits>(value, zero, inverse, codes);
      packed |= codes << (f * Bits);
    }
    const Byte8 narrow = __builtin_convertvector(packed, Byte8);
    store(narrow, bytes + 8 * eight);
  }
}

}  // namespace

BITDECODING_CLONES
void channel_ranges(const std::uint16_t* rows, int tokens, int head_dim,
                    format::GroupRange* ranges) {
  for (int c = 0; c < head_dim; c += 8) {
    Range8 range;
    for (int n = 0; n < tokens; ++n) {
      Float8 value;
      load_fp16(rows + n * head_dim + c, value);
      range.include(value);
    }
    for (int i = 0; i < 8; ++i) ranges[c + i] = range.lane(i);
  }
}

BITDECODING_CLONES
format::GroupRange token_range(const std::uint16_t* values, int count) {
  Range8 lanes;
  for (int c = 0; c < count; c += 8) {
    Float8 value;
    load_fp16(values + c, value);
    lanes.include(value);
  }
  format::GroupRange range;
  for (int i = 0; i < 8; ++i) range.include(lanes.lane(i));
  return range;
}

BITDECODING_CLONES
void encode_channels(const std::uint16_t* values, const ChannelCoders& coders, int head_dim,
                     int bits, std::uint8_t* bytes) {
  const auto load_coder = [&](int c, Float8& zero, Float8& inverse) __attribute__((always_inline)) {
    load(coders.zero + c, zero);
    load(coders.inverse_scale + c, inverse);
  };
  bits == 2 ? encode<2, CodeOrder::k>(values, head_dim, load_coder, bytes)
            : encode<4, CodeOrder::k>(values, head_dim, load_coder, bytes);
}

BITDECODING_CLONES
void encode_groups(const std::uint16_t* values, const format::GroupCoder* coders, int group,
                   int head_dim, int bits, CodeOrder order, std::uint8_t* bytes) {
  const int group_log2 = std::countr_zero(static_cast<unsigned>(group));
  const auto load_coder = [&](int c, Float8& zero, Float8& inverse) __attribute__((always_inline)) {
    const format::GroupCoder& coder = coders[c >> group_log2];
    zero = Float8{} + coder.zero;
    inverse = Float8{} + coder.inverse_scale;
  };
  if (order == CodeOrder::k) {
    bits == 2 ? encode<2, CodeOrder::k>(values, head_dim, load_coder, bytes)
              : encode<4, CodeOrder::k>(values, head_dim, load_coder, bytes);
  } else {
    bits == 2 ? encode<2, CodeOrder::v>(values, head_dim, load_coder, bytes)
              : encode<4, CodeOrder::v>(values, head_dim, load_coder, bytes);
  }
}

}  // namespace bitdecoding::cpu
