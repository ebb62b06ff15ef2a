// SPDX-License-Identifier: Apache-2.0
// The worked example of docs/format.md: its pages are packed here and every number is compared.
#include <doctest.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "example_page.hpp"
#include "page_reader.hpp"

namespace bitdecoding {
namespace {

// The lines of one ```kv-page block, comments left out.
using Block = std::vector<std::istringstream>;

std::vector<Block> read_blocks(const char* path) {
  std::ifstream file(path);
  std::vector<Block> blocks;
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    if (line == "```kv-page") {
      blocks.emplace_back();
      inside = true;
    } else if (line == "```") {
      inside = false;
    } else if (inside && !line.starts_with("#")) {
      blocks.back().emplace_back(line);
    }
  }
  return blocks;
}

// The next words of a line; `expected` must be the first.
std::string after(std::istringstream& line, const std::string& expected) {
  std::string word, value;
  line >> word >> value;
  CHECK(word == expected);
  return value;
}

std::vector<std::uint8_t> pack(const KvFormat& f, int keep_first) {
  std::vector<std::uint8_t> bytes(page_bytes(f));
  const auto pack_as = [&]<layout::PageConfig C> {
    if (layout::page_config(f) != C) return false;
    test::pack_example<C>(f, keep_first, bytes.data());
    return true;
  };
  using layout::PageConfig;
  REQUIRE((pack_as.operator()<PageConfig{4, 2, KAxis::channel, 128}>() ||
           pack_as.operator()<PageConfig{2, 4, KAxis::token, 64}>() ||
           pack_as.operator()<PageConfig{4, 2, KAxis::block, 64}>() ||
           pack_as.operator()<PageConfig{2, 4, KAxis::channel, 256}>() ||
           pack_as.operator()<PageConfig{4, 4, KAxis::channel, 64}>()));
  return bytes;
}

// ... scale_at scale zero_at zero  value
void check_group(const test::PageReader& page, bool is_k, int token, int channel,
                 std::uint32_t code, std::istringstream& line) {
  int scale_at, zero_at;
  std::uint32_t scale, zero;
  float value;
  line >> scale_at >> std::hex >> scale >> std::dec >> zero_at >> std::hex >> zero >> value;
  REQUIRE_FALSE(line.fail());
  CHECK((is_k ? page.k_scale(token, channel) : page.v_scale(token, channel)) == scale_at);
  CHECK((is_k ? page.k_zero(token, channel) : page.v_zero(token, channel)) == zero_at);
  CHECK(page.fp16(scale_at) == scale);
  CHECK(page.fp16(zero_at) == zero);
  const format::GroupParameters parameters{page.fp16(scale_at), page.fp16(zero_at)};
  CHECK(format::dequantize(code, parameters) == value);
}

// ... exponent_at exponent  value
void check_block(const test::PageReader& page, bool is_k, int token, int channel,
                 std::uint32_t code, std::istringstream& line) {
  int exponent_at, exponent;
  float value;
  line >> exponent_at >> exponent >> value;
  REQUIRE_FALSE(line.fail());
  CHECK((is_k ? page.k_exponent(token, channel) : page.v_exponent(token, channel)) == exponent_at);
  CHECK(page.bytes[exponent_at] == exponent);
  const format::GroupParameters parameters = format::block_parameters(
      static_cast<std::uint8_t>(exponent), is_k ? page.f.k_bits : page.f.v_bits);
  CHECK(format::dequantize(code, parameters) == value);
}

// K and V rows:  token channel  byte bit code  and what the code's group or block is
void check_element(const test::PageReader& page, bool is_k, std::istringstream& line) {
  int token, channel, byte, bit;
  std::uint32_t code;
  line >> token >> channel >> byte >> bit >> code;
  const test::CodePlace place = is_k ? page.k_place(token, channel) : page.v_place(token, channel);
  CHECK(place.byte == byte);
  CHECK(place.bit == bit);
  CHECK(page.code(place, is_k ? page.f.k_bits : page.f.v_bits) == code);
  page.blocks() ? check_block(page, is_k, token, channel, code, line)
                : check_group(page, is_k, token, channel, code, line);
}

// Norm rows:  token  at bits
void check_norm(const test::PageReader& page, std::istringstream& line) {
  int token, at;
  std::uint32_t bits;
  line >> token >> at >> std::hex >> bits;
  REQUIRE_FALSE(line.fail());
  CHECK(page.norm(token) == at);
  CHECK(page.fp16(at) == bits);
}

TEST_CASE("docs/format.md: every number of the worked example") {
  std::vector<Block> blocks = read_blocks("docs/format.md");
  REQUIRE(blocks.size() == 5);
  int rows = 0;
  for (Block& block : blocks) {
    REQUIRE(block.size() > 3);
    KvFormat f;
    REQUIRE(parse_kv_format(after(block[0], "page"), &f).is_ok());
    const int keep_first = std::stoi(after(block[0], "keep_first"));
    const std::vector<std::uint8_t> bytes = pack(f, keep_first);
    const test::PageReader page{f, bytes.data()};
    CHECK(std::stoi(after(block[1], "bytes")) == page_bytes(f));
    const auto crc = static_cast<std::uint32_t>(std::stoul(after(block[1], "crc32"), nullptr, 16));
    CHECK(crc == test::crc32(bytes.data(), page_bytes(f)));
    for (std::size_t i = 2; i < block.size(); ++i, ++rows) {
      CAPTURE(block[i].str());
      std::string kind;
      block[i] >> kind;
      REQUIRE((kind == "K" || kind == "V" || kind == "norm"));
      kind == "norm" ? check_norm(page, block[i]) : check_element(page, kind == "K", block[i]);
    }
  }
  CHECK(rows >= 20);
}

}  // namespace
}  // namespace bitdecoding
