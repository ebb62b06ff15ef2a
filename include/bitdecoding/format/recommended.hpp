// SPDX-License-Identifier: Apache-2.0
// The format to begin with for a number of bits: what kept a model's predictions best for its bytes,
// over several models and texts (docs/accuracy.md), with 16 first and 64 newest tokens in 16 bit.
#pragma once

#include <algorithm>

#include "bitdecoding/format/kv_format.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

namespace format {

// The table. bits: 4, 3 (K in 4 bits, V in 2) or 2. A rotation of V helps every model that was
// measured; one of K helps some and harms others, so that only a model's calibration adds it.
constexpr KvFormat recommended(int bits, int head_dim) {
  const int whole = std::min(head_dim, kMostGroupChannels);
  KvFormat f{.k_group = 128, .v_group = whole, .head_dim = head_dim, .v_rotation = whole};
  if (bits == 3) {
    f.v_bits = 2;
    f.v_group = 32;
  } else if (bits == 2) {
    f.k_bits = f.v_bits = 2;
    f.k_group = 32;
    f.k_clip = 85;
    f.v_clip = 80;
  }
  return f;
}

}  // namespace format

// On an error `*result` is untouched.
inline Status recommended_format(int bits, int head_dim, KvFormat* result) {
  if (bits < 2 || bits > 4) return invalid_argument("bits = ", bits, "; allowed: 2, 3, 4");
  const KvFormat f = format::recommended(bits, head_dim);
  if (Status status = validate(f); !status.is_ok()) return status;
  *result = f;
  return {};
}

}  // namespace bitdecoding
