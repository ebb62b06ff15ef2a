// SPDX-License-Identifier: Apache-2.0
#include "bitdecoding/format/kv_format.hpp"

#include <doctest.h>

#include <algorithm>
#include <string>
#include <unordered_set>
#include <vector>

#include "legal_formats.hpp"

namespace bitdecoding {
namespace {

constexpr int kCandidates[] = {-2147483647 - 1,
                               -128,
                               -4,
                               -1,
                               0,
                               1,
                               2,
                               3,
                               4,
                               5,
                               8,
                               16,
                               31,
                               32,
                               33,
                               48,
                               63,
                               64,
                               65,
                               96,
                               127,
                               128,
                               129,
                               192,
                               256,
                               384,
                               512};

struct Field {
  const char* name;
  int KvFormat::* value;
};
constexpr Field kFields[] = {
    {"k_bits", &KvFormat::k_bits},         {"v_bits", &KvFormat::v_bits},
    {"k_group", &KvFormat::k_group},       {"v_group", &KvFormat::v_group},
    {"head_dim", &KvFormat::head_dim},     {"page_tokens", &KvFormat::page_tokens},
    {"k_rotation", &KvFormat::k_rotation}, {"v_rotation", &KvFormat::v_rotation}};

bool is_one_of(const std::vector<KvFormat>& unrotated, KvFormat f) {
  if (!test::is_legal_rotation(f.k_rotation, f.head_dim)) return false;
  if (!test::is_legal_rotation(f.v_rotation, f.head_dim)) return false;
  f.k_rotation = f.v_rotation = 0;
  f.k_clip = f.v_clip = 100;  // any clip goes with any groups, and blocks here have none
  return std::find(unrotated.begin(), unrotated.end(), f) != unrotated.end();
}

TEST_CASE("every legal format is accepted, and its name, equality and hash tell it from the rest") {
  const std::vector<KvFormat> all = test::all_formats();
  std::unordered_set<std::string> names;
  std::unordered_set<KvFormat> set;
  std::unordered_set<std::size_t> hashes;
  for (const KvFormat& f : all) {
    CAPTURE(name(f));
    CHECK(validate(f).is_ok());
    KvFormat parsed{.k_bits = -1};
    CHECK(parse_kv_format(name(f), &parsed).is_ok());
    CHECK(parsed == f);
    CHECK(std::hash<KvFormat>{}(parsed) == std::hash<KvFormat>{}(f));
    names.insert(name(f));
    set.insert(f);
    hashes.insert(std::hash<KvFormat>{}(f));
  }
  CHECK(all.size() == 696 + 8 + 15 + 15);
  CHECK(names.size() == all.size());
  CHECK(set.size() == all.size());
  CHECK(hashes.size() == all.size());
}

TEST_CASE("changing one field gives another legal format or an error that names a field") {
  const std::vector<KvFormat> all = test::all_formats(), unrotated = test::legal_formats();
  int rejected = 0;
  for (const KvFormat& legal : all) {
    for (const Field& field : kFields) {
      for (const int value : kCandidates) {
        KvFormat f = legal;
        f.*field.value = value;
        const Status status = validate(f);
        const bool is_legal = is_one_of(unrotated, f);
        if (status.is_ok() != is_legal) FAIL(name(f), ": ", status.text());
        if (is_legal) continue;
        ++rejected;
        // The culprit is the changed field, or a group or a rotation that no longer fits it.
        const format::BrokenRule rule = format::why_invalid(f);
        const bool fits_alone = std::any_of(all.begin(), all.end(), [&](const KvFormat& other) {
          return other.*field.value == value;
        });
        const std::string culprit = rule.field;
        const bool is_part = culprit == "k_group" || culprit == "v_group" ||
                             culprit == "k_rotation" || culprit == "v_rotation";
        const bool names_culprit = culprit == field.name || (fits_alone && is_part);
        if (!names_culprit) FAIL(name(f), ": ", status.text());
        const auto broken = std::find_if(std::begin(kFields), std::end(kFields),
                                         [&](const Field& x) { return culprit == x.name; });
        if (rule.value != f.*broken->value) FAIL(name(f), ": ", status.text());
      }
    }
  }
  CHECK(rejected > 10000);
}

TEST_CASE("a message lists every value that would be legal") {
  const std::vector<KvFormat> all = test::all_formats();
  for (const Field& field : kFields) {
    for (const KvFormat& legal : all) {
      KvFormat f = legal;
      f.*field.value = 7;
      const Status status = validate(f);
      CHECK(status.code() == StatusCode::invalid_argument);
      const std::string head = std::string(field.name) + " = 7; allowed: ";
      REQUIRE(status.text().starts_with(head));
      const std::string allowed = status.text().substr(head.size());
      if (allowed.find(std::to_string(legal.*field.value)) == std::string::npos) {
        FAIL_CHECK(name(legal), ": ", status.text());
      }
    }
  }
  KvFormat f;
  f.k_axis = static_cast<KAxis>(7);
  CHECK(validate(f).text() == "k_axis = 7; allowed: channel, token, block");
}

TEST_CASE("clips: their names, their values, none in blocks") {
  KvFormat f{.k_bits = 2, .v_bits = 2, .k_clip = 85};
  CHECK(name(f) == "k2v2_c128_v128_p128_d128_kclip85");
  f.token_norm = true;
  f.v_clip = 50;
  CHECK(name(f) == "k2v2_c128_v128_p128_d128_norm_kclip85_vclip50");
  KvFormat parsed;
  CHECK(parse_kv_format(name(f), &parsed).is_ok());
  CHECK(parsed == f);
  f.v_clip = 49;
  CHECK(validate(f).text() == "v_clip = 49; allowed: 50 to 100 percent");
  f = {.k_axis = KAxis::block, .k_group = 32, .v_group = 32, .k_clip = 90};
  CHECK(validate(f).text() == "k_clip = 90; allowed: 100 (blocks)");
  CHECK(!parse_kv_format("k2v2_c128_v128_p128_d128_kclip100", &parsed).is_ok());
}

TEST_CASE("a malformed name is refused, quoted, and leaves the result alone") {
  const std::string good = "k4v2_c128_v64_p128_d128";
  std::vector<std::string> bad = {"",
                                  "k",
                                  "4",
                                  "int4",
                                  "k4v2",
                                  "K4v2_c128_v64_p128_d128",
                                  "v2k4_c128_v64_p128_d128",
                                  "k4v2_v64_c128_p128_d128",
                                  "k4v2_c128_v64_d128_p128",
                                  "k4v2_x128_v64_p128_d128",
                                  "k04v2_c128_v64_p128_d128",
                                  "k4v2_c0128_v64_p128_d128",
                                  "k4v2_c128_v64_p128_d0",
                                  "k+4v2_c128_v64_p128_d128",
                                  "k-4v2_c128_v64_p128_d128",
                                  "k4v2_c128_v64_p128_d4294967424",
                                  "k4v2_c99999999999999999999_v64_p128_d128",
                                  "k4v2_c 128_v64_p128_d128",
                                  "k4v2__c128_v64_p128_d128"};
  for (std::size_t i = 0; i < good.size(); ++i) {
    bad.push_back(good.substr(0, i) + '?' + good.substr(i));
    if (i <= good.find("_d") + 2) bad.push_back(good.substr(0, i));
  }
  for (const char* tail : {"_", "_nor", "_norms", "_norm_norm", "norm", " ", "\n", "_e5", "_kr",
                           "_kr0", "_kr064", "_vr64_kr64", "_kr64_norm", "_kr64_kr64", "_r64"}) {
    bad.push_back(good + tail);
  }
  bad.push_back(good + std::string(1, '\0'));
  for (const std::string& text : bad) {
    CAPTURE(text);
    KvFormat result{.k_bits = 2, .token_norm = true};
    const KvFormat before = result;
    const Status status = parse_kv_format(text, &result);
    CHECK(status.code() == StatusCode::invalid_argument);
    CHECK(status.text().starts_with("format = '" + text + "'; allowed: "));
    CHECK(result == before);
  }
}

TEST_CASE("a well-formed name of an illegal format is refused for its broken rule") {
  KvFormat result;
  result.v_bits = 2;
  const KvFormat before = result;
  const Status status = parse_kv_format("k4v2_c128_v64_p64_d128", &result);
  CHECK(status.text().starts_with("k_group = 128; allowed: "));
  CHECK(parse_kv_format("k3v2_c64_v64_p64_d128", &result).text() == "k_bits = 3; allowed: 2, 4");
  CHECK(parse_kv_format("k4v2_c64_v64_p64_d64_vr128", &result).text() ==
        "v_rotation = 128; allowed: 0, 16, 64, 128 channels, at most head_dim");
  CHECK(result == before);
}

}  // namespace
}  // namespace bitdecoding
