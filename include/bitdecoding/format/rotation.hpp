// SPDX-License-Identifier: Apache-2.0
// What a row of K or V becomes on arrival, once it is fp16: minus a mean, then turned by a
// Walsh-Hadamard transform of every block of channels. The definition that every back end
// reproduces bit for bit.
//   K' = rn16(H (k - mean))    V' = rn16(H v)    scores: (H q) K'    output: H (P V')
// H is orthogonal, symmetric and its own inverse. All arithmetic is IEEE fp32; no operation takes
// the result of a product, so that fusing changes nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bitdecoding/format/float16.hpp"
#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::format {

inline constexpr int kMaxRotation = 128;  // channels of a block

constexpr int longest_rotation(int head_dim) {
  return head_dim < kMaxRotation ? head_dim : kMaxRotation;
}

// 1 / sqrt(block), to the nearest fp32; 1 without rotation.
constexpr float rotation_scale(int block) {
  if (block == 16) return 0.25f;
  if (block == 64) return 0.125f;
  return block == 128 ? 0x1.6a09e6p-4f : 1.f;
}

// Channels at distance 1, 2, 4 .. block / 2, in this order, become their sum and difference.
// block = 0: the row stays as it is.
constexpr void rotate(float* row, int head_dim, int block) {
  for (int distance = 1; distance < block; distance *= 2) {
    for (int first = 0; first < head_dim; first += 2 * distance) {
      for (int c = first; c < first + distance; ++c) {
        const float a = row[c], b = row[c + distance];
        row[c] = a + b;
        row[c + distance] = a - b;
      }
    }
  }
  if (block == 0) return;
  for (int c = 0; c < head_dim; ++c) row[c] *= rotation_scale(block);
}

// What K or V of one head goes through.
struct Arrival {
  int rotation = 0;                     // channels of a block; 0: none
  const std::uint16_t* mean = nullptr;  // fp16 [D]; nullptr: none

  constexpr bool changes() const { return rotation != 0 || mean != nullptr; }
};

// Of K (tensor = 0) or V (tensor = 1); k_mean: fp16 [H, D] or nullptr.
constexpr Arrival arrival_of(const KvFormat& f, const std::uint16_t* k_mean, int head, int tensor) {
  if (tensor == 1) return {f.v_rotation, nullptr};
  return {f.k_rotation, k_mean == nullptr ? nullptr : k_mean + std::ptrdiff_t{head} * f.head_dim};
}

// One row of fp16 bits, in place.
constexpr void transform(const Arrival& arrival, std::uint16_t* row, int head_dim) {
  const int count = longest_rotation(head_dim);  // at once
  for (int first = 0; first < head_dim; first += count) {
    float x[kMaxRotation] = {};
    for (int c = 0; c < count; ++c) {
      x[c] = float_from_fp16(row[first + c]);
      if (arrival.mean != nullptr) x[c] -= float_from_fp16(arrival.mean[first + c]);
    }
    rotate(x, count, arrival.rotation);
    for (int c = 0; c < count; ++c) row[first + c] = fp16_from_float(x[c]);
  }
}

}  // namespace bitdecoding::format
