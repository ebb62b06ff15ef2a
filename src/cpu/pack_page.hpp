// SPDX-License-Identifier: Apache-2.0
// One page of one head: fp16 tokens to a complete record, padding included.
#pragma once

#include <cstdint>

#include "bitdecoding/format/kv_format.hpp"
#include "cpu/token_tile.hpp"

namespace bitdecoding::cpu {

// The first `free_tokens` tokens of the page don't widen the ranges of channel-axis K groups. With
// token norms K's tile is normalised in place.
void pack_page(const KvFormat& format, int free_tokens, TokenTile& k, const TokenTile& v,
               std::uint8_t* page);

// About what a page takes, to choose threads by.
constexpr std::int64_t pack_page_ns(const KvFormat& format) {
  return std::int64_t{format.page_tokens} * format.head_dim * 6;
}

}  // namespace bitdecoding::cpu
