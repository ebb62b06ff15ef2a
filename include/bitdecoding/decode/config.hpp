// SPDX-License-Identifier: Apache-2.0
// DecodeConfig: what a decode kernel fixes at compile time, as one value.
#pragma once

#include "bitdecoding/layout/page_config.hpp"

namespace bitdecoding::decode {

enum class Arch {
  sm80 = 80,  // cp.async ring; serves 8.0 to 8.9
  sm90 = 90,  // bulk copies and mbarriers
};

// What codes are multiplied as. A mask of a word makes four bytes or two halves, but the other
// operand's 16 bits take two bytes, two columns of an MMA.
enum class Product {
  bytes,   // integer MMAs: 4 query columns fill an n tile
  halves,  // fp16 MMAs: 8 query columns do
  wgmma,   // fp16 MMAs of a warpgroup, whose B operand lies in shared memory: 32 columns and more
};

struct DecodeConfig {
  Arch arch = Arch::sm80;
  layout::PageConfig page;
  int query_columns =
      8;  // (query tokens x query heads per KV head) of a tile: 4, 8, 16; sm90: 32, 64

  constexpr Product product() const {
    if (query_columns <= 4) return Product::bytes;
    return query_columns <= 16 ? Product::halves : Product::wgmma;
  }
  friend constexpr bool operator==(const DecodeConfig&, const DecodeConfig&) = default;
};

// The warps that are one stream. At head_dim 256, O and Q' of 16 columns are more than a warp's
// registers: two warps walk through the same items, each with 8 columns of its own.
constexpr int stream_warps(const DecodeConfig& config) {
  if (config.product() == Product::wgmma) return 4;
  return config.page.head_dim > 128 && config.query_columns > 8 ? 2 : 1;
}
// What one of its warps computes by itself; warps of wgmma work together.
constexpr DecodeConfig warp_config(DecodeConfig config) {
  if (config.product() != Product::wgmma) config.query_columns /= stream_warps(config);
  return config;
}

// Warps of a CTA, one CTA per SM: as many as the registers of a stream allow.
constexpr int max_warps(const DecodeConfig& config) {
  if (config.page.head_dim > 128) return 8;
  return config.query_columns <= 8 || config.query_columns == 32 ? 12 : 8;
}
// Fewer, where shared memory has no room for their rings: by so many, down to so many. Two stages
// of head_dim 256 are up to 40 KB.
constexpr int warp_step(const DecodeConfig& config) { return config.page.head_dim > 128 ? 2 : 4; }
constexpr int min_warps(const DecodeConfig& config) {
  return config.page.head_dim > 128 && config.arch == Arch::sm80 ? 2 * stream_warps(config) : 4;
}

// Tokens of a 16-bit tile: about the bytes of one packed chunk.
inline constexpr int kZoneTokens = 16;
// Rows of a 16-bit tile are padded in shared memory, so that eight rows meet eight bank groups.
constexpr int zone_row_bytes(int head_dim) { return 2 * head_dim + 16; }
constexpr int zone_tile_bytes(int head_dim) { return 2 * kZoneTokens * zone_row_bytes(head_dim); }

}  // namespace bitdecoding::decode
