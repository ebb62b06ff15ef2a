// SPDX-License-Identifier: Apache-2.0
// Values of a token tile to codes: the arithmetic of format/quantizer.hpp, operation by operation,
// on eight values at a time. The tests hold every byte to it.
// Codes of one token become bytes in word order: byte 8 * word + x holds, at bit f * bits, the code
// of channel 8 * F * word + 8 * f + x  (F = 8 / bits fields). K and V words both gather such bytes.
#pragma once

#include <cstdint>

#include "bitdecoding/format/quantizer.hpp"
#include "cpu/token_tile.hpp"

namespace bitdecoding::cpu {

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

// `count` channels of one token, a coder for each.
void encode_channels(const std::uint16_t* values, const ChannelCoders& coders, int count, int bits,
                     std::uint8_t* bytes);

// `count` channels of one token that share a coder.
void encode_group(const std::uint16_t* values, const format::GroupCoder& coder, int count, int bits,
                  std::uint8_t* bytes);

}  // namespace bitdecoding::cpu
