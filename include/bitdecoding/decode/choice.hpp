// SPDX-License-Identifier: Apache-2.0
// Which row of the kernel table serves a decode call: a table of data, and which row steps in where
// the table's is not built. Pure; the host test lists what every kind of call gets.
#pragma once

#include <climits>
#include <span>

#include "bitdecoding/decode/config.hpp"
#include "bitdecoding/decode/groups.hpp"

namespace bitdecoding::decode {

inline constexpr int kAnyColumns = INT_MAX;

// Calls of up to `columns` query columns (query tokens x query heads per KV head) get tiles of
// `tile` of them. A tile reads the cache once: wider calls read it again for every further tile.
struct TileChoice {
  Arch arch;
  int columns;
  int tile;
};

// The first line of the device's arch that is wide enough. At head_dim 256 there is no tile wider
// than 16: it serves wider calls.
inline constexpr TileChoice kTileChoices[] = {
    // arch, columns, tile         us with it (another tile: us) on an H200, 4-bit | 2-bit
    {Arch::sm80, 4, 4},             // not measured on 8.x
    {Arch::sm80, 8, 8},             // not measured on 8.x
    {Arch::sm80, kAnyColumns, 16},  // not measured on 8.x
    {Arch::sm90, 4, 4},             // 8x8x4@131072: 264 (8: 268) | 151 (8: 170)
    {Arch::sm90, 8, 8},             // 128x8x8@4096: 164 (4: 302) | 109 (4: 193)
    {Arch::sm90, 16, 16},           // 8x8x16@32768: 95 (32: 154) | 79 (32: 152)
    {Arch::sm90, 32, 32},           // 8x8x32@32768: 149 (16: 182) | 147 (16: 145)
    {Arch::sm90, kAnyColumns, 64},  // 8x8x64@32768: 253 (16: 354) | 254 (16: 284)
};

// Rows of Arch::sm90 run on 9.0 alone. `compute_capability`: 90 for 9.0.
constexpr Arch arch_of(int compute_capability) {
  return compute_capability / 10 == 9 ? Arch::sm90 : Arch::sm80;
}

constexpr int preferred_tile(Arch arch, int columns) {
  for (const TileChoice& choice : kTileChoices) {
    if (choice.arch == arch && columns <= choice.columns) return choice.tile;
  }
  return 0;  // never: an arch's last line takes any columns
}

// Whether a kernel has code for the format: those of wgmma need one scale per chunk or token.
constexpr bool serves(const DecodeConfig& config, const KvFormat& format) {
  return config.page == layout::page_config(format) &&
         (config.product() != Product::wgmma || has_whole_groups(format));
}

// The row of `units` (of the kernel table; a Row has a `config`) for that format and arch:
// with the preferred tile, else the narrowest wider one, else the widest. nullptr: there is none.
template <class Row>
constexpr const Row* choose_decode_row(std::span<const std::span<const Row>> units, Arch arch,
                                       const KvFormat& format, int columns) {
  const int preferred = preferred_tile(arch, columns);
  const auto distance = [preferred](const Row& row) {
    const int tile = row.config.query_columns;
    return tile >= preferred ? tile - preferred : INT_MAX - tile;
  };
  const Row* best = nullptr;
  for (const std::span<const Row> unit : units) {
    for (const Row& row : unit) {
      if (row.config.arch != arch || !serves(row.config, format)) continue;
      if (best == nullptr || distance(row) < distance(*best)) best = &row;
    }
  }
  return best;
}

}  // namespace bitdecoding::decode
