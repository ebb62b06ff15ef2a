// SPDX-License-Identifier: Apache-2.0
#include "bitdecoding/layout/page_record.hpp"

#include <doctest.h>

#include <vector>

#include "legal_formats.hpp"
#include "page_reader.hpp"

namespace bitdecoding::layout {
namespace {

struct Section {
  int begin;
  int bytes;
};

// The sections of a chunk in the documented order; absent ones have 0 bytes.
std::vector<Section> sections(const PageRecord& r, int chunk, int first_group) {
  std::vector<Section> all;
  for (int g = 0; g < r.k_groups_beginning_in(chunk); ++g) {
    all.push_back({r.k_group(first_group + g), r.k_group_bytes()});
  }
  all.push_back({r.k_codes(chunk), r.k_codes_bytes()});
  all.push_back({r.v_codes(chunk), r.v_codes_bytes()});
  all.push_back({r.v_parameters(chunk), r.v_parameters_bytes()});
  all.push_back({r.k_token_parameters(chunk), r.k_token_parameters_bytes()});
  all.push_back({r.token_norms(chunk), r.token_norms_bytes()});
  return all;
}

TEST_CASE("sections lie in order, aligned, without gap or overlap, and fill the record") {
  for (const KvFormat& f : test::legal_formats()) {
    CAPTURE(name(f));
    const PageRecord r(f);
    int end = 0, group = 0;
    for (int chunk = 0; chunk < f.chunks(); ++chunk) {
      REQUIRE(r.chunk(chunk) == end);
      for (const Section& section : sections(r, chunk, group)) {
        REQUIRE(section.begin == end);
        REQUIRE(section.begin % kSectionAlignment_bytes == 0);
        end += section.bytes;
      }
      group += r.k_groups_beginning_in(chunk);
    }
    REQUIRE(end == r.page_bytes());  // no legal format needs padding
    REQUIRE(r.page_bytes() % kRecordAlignment_bytes == 0);
    REQUIRE(r.page_bytes() == page_bytes(f));
    REQUIRE(group == (f.k_axis == KAxis::channel ? f.k_groups() : 0));
  }
}

TEST_CASE("parameters of a K group lie in the chunk of its first token") {
  for (const KvFormat& f : test::legal_formats()) {
    if (f.k_axis != KAxis::channel) continue;
    CAPTURE(name(f));
    const PageRecord r(f);
    for (int group = 0; group < f.k_groups(); ++group) {
      const int chunk = group * f.k_group / kChunkTokens;
      REQUIRE(r.k_group(group) >= r.chunk(chunk));
      REQUIRE(r.k_group(group) + r.k_group_bytes() <= r.k_codes(chunk));
    }
  }
}

TEST_CASE("a run of chunks that starts at a K group holds every byte its tokens need") {
  for (const KvFormat& f : test::legal_formats()) {
    CAPTURE(name(f));
    const PageRecord r(f);
    for (int first = 0; first < f.chunks(); ++first) {
      const int first_token = first * kChunkTokens;
      if (f.k_axis == KAxis::channel && first_token % f.k_group != 0) continue;
      for (int last = first; last < f.chunks(); ++last) {
        const int begin = r.chunk(first), end = r.chunk(last + 1);
        for (int token = first_token; token < (last + 1) * kChunkTokens; ++token) {
          const int chunk = token / kChunkTokens;
          REQUIRE(
              (r.k_codes(chunk) >= begin && r.token_norms(chunk) + r.token_norms_bytes() <= end));
          if (f.k_axis != KAxis::channel) continue;
          const int group = r.k_group(token / f.k_group);
          REQUIRE((group >= begin && group + r.k_group_bytes() <= end));
        }
      }
    }
  }
}

TEST_CASE("offsets equal those of the independent reader") {
  for (const KvFormat& f : test::legal_formats()) {
    CAPTURE(name(f));
    const PageRecord r(f);
    const test::PageReader reader{f};
    for (int chunk = 0; chunk < f.chunks(); ++chunk) {
      REQUIRE(r.k_codes(chunk) == reader.k_codes(chunk));
      REQUIRE(r.v_codes(chunk) == reader.v_codes(chunk));
      REQUIRE(r.v_parameters(chunk) == reader.v_parameters(chunk));
      REQUIRE(r.k_token_parameters(chunk) == reader.k_token_parameters(chunk));
      REQUIRE(r.token_norms(chunk) == reader.token_norms(chunk));
    }
    REQUIRE(r.page_bytes() == reader.page_bytes());
  }
}

static_assert(bits_per_element({.k_bits = 4, .v_bits = 4}) == 4.25);
static_assert(bits_per_element({.k_bits = 2, .v_bits = 2}) == 2.25);
static_assert(bits_per_element({.k_bits = 4, .v_bits = 2}) == 3.25);

static_assert(bits_per_element({.k_axis = KAxis::block, .k_group = 32, .v_group = 32}) == 4.25);

TEST_CASE("bits per element are the codes', plus 32 for every group or 8 for every block") {
  for (const KvFormat& f : test::legal_formats()) {
    const double norm = f.token_norm ? 16.0 / f.head_dim : 0.0;
    const double group = f.has_blocks() ? 8.0 : 32.0;
    const double k = f.k_bits + group / f.k_group + norm, v = f.v_bits + group / f.v_group;
    CHECK(bits_per_element(f) == doctest::Approx((k + v) / 2));
  }
}

}  // namespace
}  // namespace bitdecoding::layout
