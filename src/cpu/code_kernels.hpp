// SPDX-License-Identifier: Apache-2.0
// The inner loops of decode, for a few query rows against one run of tokens. Vectors run over eight
// neighbouring tokens (K) or channels (V): the g of a packed word's lane 4g + t, see
// layout/code_layout.hpp. Words are transposed eight at a time so that g becomes the vector; then a
// shift, a mask and a conversion give eight codes, and each row costs one multiply-add for them.
// A code in field f of its byte arrives as code * 2^(f * bits); the weights of page_map.hpp take
// that back.
#pragma once

#include <cstdint>

#include "bitdecoding/layout/page_config.hpp"

namespace bitdecoding::cpu {

inline constexpr int kRowTile = 8;          // query rows that share a pass over the cache
inline constexpr int kSegmentTokens = 512;  // tokens per softmax step: scores stay in L1
inline constexpr int kMaxVGroups = layout::kMaxHeadDim / 32;

// Lane order: channel 8i + 2t + h at t * D/4 + 2i + h, the order of channel-axis parameters.
constexpr int lane_order(int channel, int head_dim) {
  return channel % 8 / 2 * (head_dim / 4) + channel / 8 * 2 + channel % 2;
}

// Row-major arrays below have `rows` <= kRowTile rows of:
//   q (D)   scores, p (kSegmentTokens)   out (D)

// Widens one plane of 64 fp16 token parameters (token 8i + g at 8g + i) into token order.
void widen_token_plane(const std::uint16_t* plane, float* values);

// Channel-axis K group: scaled = q * scale * weight, bias[row] = sum of q * zero. In lane order.
void fold_channel_group(const float* q, const float* weights, const std::uint16_t* scales,
                        const std::uint16_t* zeros, int head_dim, int rows, float* scaled,
                        float* bias);

// K codes of `blocks` 16-token blocks, of channels [first_channel, first_channel + channels): whole
// runs of 32, which lie in one field position (2 bits: two positions) of some words.
struct KeyCodes {
  const std::uint8_t* codes;
  int bits, head_dim;
  int blocks;
  int first_channel, channels;
};
// scores[token] = bias[row] + sum over channels of q * code * 2^(field bits); q in lane order.
void score_codes(const KeyCodes& k, const float* q, const float* bias, int rows, float* scores);

// scores[token] += partial[token] * scales[token] + q_sum[row] * zeros[token], for 64 tokens.
void add_token_group(const float* partial, const float* scales, const float* zeros,
                     const float* q_sum, int rows, float* scores);

// scores[token] *= factors[token], for 64 tokens.
void multiply_scores(const float* factors, int rows, float* scores);

// fp16 keys, rows of head_dim: scores[token] = q * k; q in channel order.
void score_rows(const std::uint16_t* k, int head_dim, int tokens, const float* q, int rows,
                float* scores);

// scores (base 2) become p = 2^(score - maximum); sums[row] is their sum. `tokens` is a multiple
// of 8. A maximum is at least kScoreFloor, so that -inf marks what isn't attended.
inline constexpr float kScoreFloor = -0x1p100f;
void softmax(int tokens, int rows, float* scores, float* maxima, float* sums);

// Of 64 tokens from `first_token` on: scaled[row * 64 + token] = p * scale, else 0;
// zero_sums[row * kMaxVGroups] += sum of p * zero.
void scale_probabilities(const float* p, const float* scales, const float* zeros, int first_token,
                         int rows, float* scaled, float* zero_sums);

// V codes of a chunk of 64 tokens, of the channels [first_channel, first_channel + channels).
struct ValueCodes {
  const std::uint8_t* codes;
  int bits, head_dim;
  int first_channel, channels;
};
// out[channel] += sum over tokens of p[row * 64 + token] * code * 2^(field bits).
void add_codes(const ValueCodes& v, const float* p, int rows, float* out);

// Behind the last chunk: out = out * weight + the zero sum of the channel's group.
void finish_codes(const float* weights, const float* zero_sums, int head_dim, int group, int rows,
                  float* out);

// fp16 values, rows of head_dim: out[channel] += sum over tokens of p * v.
void add_rows(const std::uint16_t* v, int head_dim, int tokens, const float* p, int rows,
              float* out);

}  // namespace bitdecoding::cpu
