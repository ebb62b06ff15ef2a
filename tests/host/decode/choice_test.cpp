// SPDX-License-Identifier: Apache-2.0
// Which kernel every kind of decode call gets, by name: of a whole table, and of parts of it.
#include "bitdecoding/decode/choice.hpp"

#include <doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bitdecoding/build_info.hpp"
#include "bitdecoding/run.hpp"

namespace bitdecoding {
namespace {

using decode::Arch;
using layout::PageConfig;

constexpr PageConfig kPage{2, 2, KAxis::channel, 128};
constexpr PageConfig kOtherPage{4, 2, KAxis::token, 64};
constexpr PageConfig kWidePage{2, 2, KAxis::channel, 256};
constexpr KvFormat kFormat{.k_bits = 2, .v_bits = 2};
constexpr KvFormat kWideFormat{.k_bits = 2, .v_bits = 2, .head_dim = 256};
constexpr KvFormat kOtherFormat{
    .v_bits = 2, .k_axis = KAxis::token, .k_group = 64, .v_group = 64, .head_dim = 64};

struct Row {
  decode::DecodeConfig config;
  std::string name;
};

std::string row_name(Arch arch, const PageConfig& page, int tile) {
  return "decode_sm" + std::to_string(static_cast<int>(arch)) + "_k" + std::to_string(page.k_bits) +
         "v" + std::to_string(page.v_bits) + (page.k_axis == KAxis::channel ? "_c_d" : "_t_d") +
         std::to_string(page.head_dim) + "_n" + std::to_string(tile);
}

// A table with these tiles of the pages and both archs, in a unit per page.
struct Table {
  explicit Table(const std::vector<int>& tiles,
                 const std::vector<PageConfig>& pages = {kOtherPage, kPage}) {
    for (const PageConfig& page : pages) {
      std::vector<Row>& unit = rows.emplace_back();
      for (const Arch arch : {Arch::sm80, Arch::sm90}) {
        for (const int tile : tiles) {
          unit.push_back({{arch, page, tile}, row_name(arch, page, tile)});
        }
      }
    }
  }

  std::string choice(int compute_capability, int columns, const KvFormat& format = kFormat) const {
    const std::vector<std::span<const Row>> units(rows.begin(), rows.end());
    const Row* row =
        decode::choose_decode_row<Row>(units, decode::arch_of(compute_capability), format, columns);
    return row == nullptr ? "" : row->name;
  }

  std::vector<std::vector<Row>> rows;
};

constexpr int kColumns[] = {1, 4, 5, 8, 9, 16, 17, 32, 64};

struct Expected {
  int compute_capability;
  const char* kernels[std::size(kColumns)];  // one for each of kColumns
};

}  // namespace

TEST_CASE("the kernel of every kind of call, all of them built") {
  const char *a4 = "decode_sm80_k2v2_c_d128_n4", *a8 = "decode_sm80_k2v2_c_d128_n8",
             *a16 = "decode_sm80_k2v2_c_d128_n16";
  const char *h4 = "decode_sm90_k2v2_c_d128_n4", *h8 = "decode_sm90_k2v2_c_d128_n8",
             *h16 = "decode_sm90_k2v2_c_d128_n16", *h32 = "decode_sm90_k2v2_c_d128_n32",
             *h64 = "decode_sm90_k2v2_c_d128_n64";
  const Expected expected[] = {
      // columns 1   4   5   8   9    16   17   32   64
      {80, {a4, a4, a8, a8, a16, a16, a16, a16, a16}},
      {86, {a4, a4, a8, a8, a16, a16, a16, a16, a16}},
      {89, {a4, a4, a8, a8, a16, a16, a16, a16, a16}},
      {90, {h4, h4, h8, h8, h16, h16, h32, h32, h64}},
  };
  const Table table({4, 8, 16, 32, 64});
  for (const Expected& row : expected) {
    for (std::size_t i = 0; i < std::size(kColumns); ++i) {
      CAPTURE(kColumns[i]);
      CHECK(table.choice(row.compute_capability, kColumns[i]) == row.kernels[i]);
    }
  }
  CHECK(table.choice(90, 1, kOtherFormat) == "decode_sm90_k4v2_t_d64_n4");
  KvFormat absent = kOtherFormat;
  absent.v_bits = 4;
  CHECK(table.choice(90, 1, absent).empty());
}

TEST_CASE("tiles of 32 and 64 columns are for whole groups without norms") {
  const Table table({4, 8, 16, 32, 64});
  CHECK(table.choice(90, 1000, {.k_bits = 2, .v_bits = 2, .k_group = 64}) ==
        "decode_sm90_k2v2_c_d128_n64");
  CHECK(table.choice(90, 1000, kOtherFormat) == "decode_sm90_k4v2_t_d64_n64");
  for (const KvFormat& format : {KvFormat{.k_bits = 2, .v_bits = 2, .k_group = 32},
                                 KvFormat{.k_bits = 2, .v_bits = 2, .v_group = 64},
                                 KvFormat{.k_bits = 2, .v_bits = 2, .token_norm = true}}) {
    for (const int columns : {17, 64, 1000}) {
      CHECK(table.choice(90, columns, format) == "decode_sm90_k2v2_c_d128_n16");
    }
  }
  const KvFormat blocks{.k_axis = KAxis::block, .k_group = 32, .v_group = 32};
  for (const int tile : {4, 8, 16, 32, 64}) {
    CHECK(decode::serves({Arch::sm90, layout::page_config(blocks), tile}, blocks) == (tile <= 16));
  }
}

TEST_CASE("wide calls get tiles of 16 at head_dim 256: there are no wider ones") {
  const Table table({4, 8, 16}, {kWidePage});
  for (const int capability : {80, 89, 90}) {
    const std::string row = row_name(decode::arch_of(capability), kWidePage, 0);
    const std::string prefix = row.substr(0, row.size() - 1);
    CHECK(table.choice(capability, 4, kWideFormat) == prefix + "4");
    CHECK(table.choice(capability, 5, kWideFormat) == prefix + "8");
    for (const int columns : {9, 16, 17, 32, 64, 1000}) {
      CHECK(table.choice(capability, columns, kWideFormat) == prefix + "16");
    }
  }
  KvFormat small_groups = kWideFormat;
  small_groups.k_group = small_groups.v_group = 32;
  CHECK(table.choice(90, 64, small_groups) == "decode_sm90_k2v2_c_d256_n16");
}

TEST_CASE("where a tile is not built the next wider one serves, else the widest") {
  const auto tiles = [](const Table& table) {
    std::string text;
    for (const int columns : kColumns) {
      const std::string name = table.choice(90, columns);
      text += name.substr(name.rfind('_') + 1) + ' ';
    }
    return text;
  };
  CHECK(tiles(Table({8, 16})) == "n8 n8 n8 n8 n16 n16 n16 n16 n16 ");
  CHECK(tiles(Table({16, 8})) == "n8 n8 n8 n8 n16 n16 n16 n16 n16 ");
  CHECK(tiles(Table({64, 4, 32})) == "n4 n4 n32 n32 n32 n32 n32 n32 n64 ");
  CHECK(tiles(Table({4, 8})) == "n4 n4 n8 n8 n8 n8 n8 n8 n8 ");
  CHECK(tiles(Table({})) == "         ");
}

TEST_CASE("every arch has a tile for any number of columns") {
  for (const Arch arch : {Arch::sm80, Arch::sm90}) {
    for (const int columns : {1, 3, 100, decode::kAnyColumns}) {
      CHECK(decode::preferred_tile(arch, columns) >= 4);
    }
  }
}

TEST_CASE("the library chooses among the kernels of its build") {
  const std::vector<std::string> built = build_info().kernels;
  const KvFormat format{.k_bits = 2, .v_bits = 2};
  for (const int capability : {80, 86, 89, 90}) {
    std::vector<int> tiles;  // of this page on this arch
    for (const int tile : {4, 8, 16, 32, 64}) {
      const std::string name = row_name(decode::arch_of(capability), kPage, tile);
      if (std::find(built.begin(), built.end(), name) != built.end()) tiles.push_back(tile);
    }
    const Table table(tiles);
    for (const int columns : kColumns) {
      CAPTURE(capability);
      CAPTURE(columns);
      const char* kernel = "";
      const Status status = choose_decode_kernel(format, columns, capability, &kernel);
      CHECK(kernel == table.choice(capability, columns));
      CHECK(status.code() == (tiles.empty() ? StatusCode::unsupported : StatusCode::ok));
    }
  }
}

}  // namespace bitdecoding
