// SPDX-License-Identifier: Apache-2.0
// What the C++ decode benchmark is asked for, by the rules of benchmarks/decode_cases.py.
#include "decode_case.hpp"

#include <doctest.h>

#include "quantile.hpp"

namespace bitdecoding::bench {
namespace {

std::string refused(const std::vector<std::string>& arguments) {
  Request request;
  return parse_request(arguments, &request).text();
}

}  // namespace

TEST_CASE("arguments are told by their shape") {
  Request r;
  REQUIRE(parse_request({"decode_sm90_k2v2_c_d128_n8", "8x8x4@131072", "1x2x3@4"}, &r).is_ok());
  CHECK(r.kernel == "decode_sm90_k2v2_c_d128_n8");
  CHECK(name(r.format) == "k2v2_c128_v128_p128_d128");
  CHECK(r.keep_first == 16);
  CHECK(r.keep_last == 64);
  REQUIRE(r.cases.size() == 2);
  CHECK(r.cases[0].length == 131072);
  CHECK(r.cases[1].batch == 1);
  CHECK(r.cases[1].heads_kv == 2);
  CHECK(r.cases[1].group == 3);
  REQUIRE(
      parse_request({"decode_sm80_k4v2_t_d64_n16", "0/7", "k4v2_t32_v32_p64_d64", "1x1x1@9"}, &r)
          .is_ok());
  CHECK(name(r.format) == "k4v2_t32_v32_p64_d64");
  CHECK(r.keep_first == 0);
  CHECK(r.keep_last == 7);
  CHECK(r.cases.size() == 1);
  REQUIRE(parse_request({"decode_sm80_k4v2_t_d64_n16", "1x1x1@9"}, &r).is_ok());
  CHECK(name(r.format) == "k4v2_t64_v64_p128_d64");
  REQUIRE(parse_request({"decode_sm90_k4v4_b_d128_n8", "1x1x1@9"}, &r).is_ok());
  CHECK(name(r.format) == "k4v4_b32_v32_p128_d128");
}

TEST_CASE("what can't be timed is refused by value and what is allowed") {
  const std::string row = "decode_sm90_k4v4_c_d128_n8";
  CHECK(refused({}) == "kernel = ''; allowed: a row of the kernel table");
  for (const char* kernel : {"pack_k4v4_c_d64", "decode_sm90_k4v4_x_d128_n8", "8x8x4@4096",
                             "decode_sm90_k4v4_c_d128_n8 "}) {
    CHECK(refused({kernel, "1x1x1@9"}).starts_with("kernel = '"));
  }
  CHECK(refused({"decode_sm90_k3v4_c_d128_n8", "1x1x1@9"}) == "k_bits = 3; allowed: 2, 4");
  CHECK(refused({row}) == "no case; allowed: one or more, as in 8x8x4@4096");
  for (const char* text : {"8x8@4096", "0x8x4@4096", "8x8x4", "8x8x4@4096k"}) {
    CHECK(refused({row, text}).starts_with("case = '"));
  }
  CHECK(refused({row, "16/64/1"}).starts_with("zones = '16/64/1'; allowed: "));
  CHECK(refused({row, "k4v4"}).starts_with("format = 'k4v4'; allowed: "));
}

TEST_CASE("stages are timed in every format, or in those that are named") {
  std::vector<Request> all;
  REQUIRE(parse_stage_requests({"8x8x4@131072", "1x2x3@4", "0/7"}, &all).is_ok());
  REQUIRE(all.size() == std::size(kStageFormats));
  for (std::size_t i = 0; i < all.size(); ++i) {
    CHECK(name(all[i].format) == kStageFormats[i]);
    CHECK(all[i].cases.size() == 2);
    CHECK(all[i].keep_last == 7);
  }
  std::vector<Request> one;
  REQUIRE(parse_stage_requests({"k2v2_c64_v64_p128_d128", "1x1x1@9"}, &one).is_ok());
  REQUIRE(one.size() == 1);
  CHECK(name(one[0].format) == "k2v2_c64_v64_p128_d128");
  CHECK(one[0].keep_first == 16);
  const auto refused = [](const std::vector<std::string>& arguments) {
    std::vector<Request> none;
    return parse_stage_requests(arguments, &none).text();
  };
  CHECK(refused({"0/0"}) == "no case; allowed: one or more, as in 8x8x4@4096");
  CHECK(refused({"8x8@4096"}).starts_with("case = '8x8@4096'; allowed: "));
  CHECK(refused({"1x1x1@9", "k4v4"}).starts_with("format = 'k4v4'; allowed: "));
}

TEST_CASE("bytes and rotation are those of the Python benchmark") {
  Request r;
  REQUIRE(parse_request({"decode_sm90_k4v4_c_d128_n8", "8x8x4@131072", "0/0"}, &r).is_ok());
  const std::int64_t queries = 2 * 8 * 32 * 128 * 2;
  CHECK(decode_bytes(r.cases[0], r) == std::int64_t{8 * 8 * 1024} * 17408 + queries);
  r.keep_first = 16;  // page 0 is read besides; of 700 tokens 512 are packed, 188 in the tail
  r.keep_last = 64;
  const Case small{.batch = 2, .heads_kv = 2, .group = 4, .length = 700};
  CHECK(decode_bytes(small, r) == 4 * (4 * 17408 + (16 + 188) * 512) + 2 * 2 * 2 * 8 * 128);
  r.keep_first = 128;  // nothing of page 0 is read
  CHECK(decode_bytes(small, r) == 4 * (3 * 17408 + (128 + 188) * 512) + 2 * 2 * 2 * 8 * 128);

  const std::int64_t l2 = 60 << 20;
  CHECK(copies_needed(1 << 30, l2) == 2);
  CHECK(copies_needed(std::int64_t{30} << 30, l2) == 1);
  for (const std::int64_t moved : {std::int64_t{4'000'000}, l2, 3 * l2 + 1, 4 * l2, 5 * l2}) {
    const int copies = copies_needed(moved, l2);
    CHECK((copies - 1) * moved >= 4 * l2);
    CHECK((copies == 2 || (copies - 2) * moved < 4 * l2));
  }
  CHECK(launches_needed(2) == 20);
  CHECK(launches_needed(3) == 21);
  CHECK(launches_needed(52) == 52);
  CHECK(quantile({4, 1, 3, 2}, 0.5) == 2.5);
  CHECK(quantile({7}, 0.9) == 7);
}

}  // namespace bitdecoding::bench
