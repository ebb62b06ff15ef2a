// SPDX-License-Identifier: Apache-2.0
// Values of a token tile to codes: the arithmetic of format/quantizer.hpp, operation by operation,
// on eight values at a time. The tests hold every byte to it.
// Codes of one token become bytes in the order of K's or of V's words, which gather such bytes.
#pragma once

#include <cstdint>

#include "bitdecoding/format/quantizer.hpp"
#include "cpu/token_tile.hpp"

namespace bitdecoding::cpu {

// Byte 8 * i + x of a token holds, at bit f * bits, the code of channel      (F = 8 / bits fields)
//   k   64 * (i / O) + 32 * (f % 2) + 16 * (f / 2) + 8 * (i % O) + x         (O = 8 / F)
//   v   8 * F * i + 8 * f + x
enum class CodeOrder { k, v };

// Range of each of `head_dim` channels over `tokens` rows.
void channel_ranges(const std::uint16_t* rows, int tokens, int head_dim,
                    format::GroupRange* ranges);

// Range of `count` channels of one token; count is a multiple of 32.
format::GroupRange token_range(const std::uint16_t* values, int count);

// What turns each channel of a token into its code: see format::GroupCoder.
struct ChannelCoders {
  alignas(64) float zero[kMaxHeadDim];
  alignas(64) float inverse_scale[kMaxHeadDim];

  void set(int channel, const format::GroupCoder& coder) {
    zero[channel] = coder.zero;
    inverse_scale[channel] = coder.inverse_scale;
  }
};

// One token of K, a coder for each channel.
void encode_channels(const std::uint16_t* values, const ChannelCoders& coders, int head_dim,
                     int bits, std::uint8_t* bytes);

// One token, a coder for each `group` channels.
void encode_groups(const std::uint16_t* values, const format::GroupCoder* coders, int group,
                   int head_dim, int bits, CodeOrder order, std::uint8_t* bytes);

}  // namespace bitdecoding::cpu
