// SPDX-License-Identifier: Apache-2.0
#include "bitdecoding/layout/parameter_layout.hpp"

#include <doctest.h>

#include <map>
#include <vector>

#include "legal_formats.hpp"

namespace bitdecoding::layout {
namespace {

// f(element of the layout, group) for every (token, channel) of a page.
template <class F>
void for_each_element(const KvFormat& f, const auto& layout, const auto& group, const F& visit) {
  for (int token = 0; token < f.page_tokens; ++token) {
    for (int channel = 0; channel < f.head_dim; ++channel) {
      visit(static_cast<int>(layout(token, channel)), group(token, channel));
    }
  }
}

// Whether elements of one group share one fp16 and those of different groups never do.
bool is_one_value_per_group(const KvFormat& f, const auto& layout, const auto& group) {
  std::map<int, int> group_of;
  std::map<int, int> element_of;
  bool good = true;
  for_each_element(f, layout, group, [&](int element, int g) {
    good = good && group_of.emplace(element, g).first->second == g;
    good = good && element_of.emplace(g, element).first->second == element;
  });
  return good;
}

template <int HeadDim>
auto k_group_index(const KvFormat& f) {
  return [f](int token, int channel) {
    return f.k_axis == KAxis::channel ? token / f.k_group * HeadDim + channel
                                      : token * f.k_groups() + channel / f.k_group;
  };
}

template <int HeadDim>
void check_k(const KvFormat& f) {
  const PageRecord record(f);
  const auto group = k_group_index<HeadDim>(f);
  const int chunk = record.chunk_stride() / kParameter_bytes;
  int misplaced = 0;
  if (f.k_axis == KAxis::channel) {
    const auto layout = channel_parameter_layout<HeadDim>(record);
    REQUIRE(is_one_value_per_group(f, layout, group));
    for (int g = 0; g < f.k_groups(); ++g) {
      const int first = (record.k_group(g) - record.k_group(0)) / kParameter_bytes;
      for (int i = 0; i < HeadDim / 8; ++i) {
        for (int t = 0; t < 4; ++t) {
          for (int h = 0; h < 2; ++h) {
            const int element = layout(g * f.k_group, 8 * i + 2 * t + h);
            misplaced += element != first + t * HeadDim / 4 + 2 * i + h;
          }
        }
      }
    }
  } else {
    const auto layout = token_parameter_layout(record, f.k_group);
    REQUIRE(is_one_value_per_group(f, layout, group));
    for (int token = 0; token < f.page_tokens; ++token) {
      for (int g = 0; g < f.k_groups(); ++g) {
        const int i = token % 64 / 8, lane_row = token % 8;
        const int element = layout(token, g * f.k_group);
        misplaced += element != token / 64 * chunk + 128 * g + 8 * lane_row + i;
      }
    }
  }
  CHECK(misplaced == 0);
}

void check_v(const KvFormat& f) {
  const PageRecord record(f);
  const auto layout = token_parameter_layout(record, f.v_group);
  REQUIRE(is_one_value_per_group(f, layout, [&](int token, int channel) {
    return token * f.v_groups() + channel / f.v_group;
  }));
  const auto norms = token_order_layout(record);
  for (int token = 0; token < f.page_tokens; ++token) {
    REQUIRE(norms(token) == layout(token, 0));  // norms lie like one plane of V's parameters
  }
}

// Exponents are bytes in the order of the fp16 planes, the next block 64 further.
void check_blocks(const KvFormat& f) {
  const PageRecord record(f);
  const auto layout = exponent_layout(record);
  REQUIRE(is_one_value_per_group(
      f, layout, [&](int token, int channel) { return token * f.v_groups() + channel / 32; }));
  std::vector<char> used(record.page_bytes());
  for (int token = 0; token < f.page_tokens; ++token) {
    for (int channel = 0; channel < f.head_dim; ++channel) {
      const int byte = layout(token, channel);
      REQUIRE(byte == token / 64 * record.chunk_stride() + 64 * (channel / 32) + 8 * (token % 8) +
                          token % 64 / 8);
      used.at(record.v_parameters(0) + byte) = 1;
      used.at(record.k_token_parameters(0) + byte) = 1;
    }
  }
  for (int chunk = 0; chunk < f.chunks(); ++chunk) {
    for (int i = 0; i < 2 * record.v_parameters_bytes(); ++i) {
      REQUIRE(used.at(record.v_parameters(chunk) + i));
    }
  }
}

// Byte offsets of all parameters a format stores, scales and zeros.
template <int HeadDim>
std::vector<int> parameter_bytes(const KvFormat& f) {
  const PageRecord record(f);
  std::vector<int> bytes;
  const auto add = [&](int section, int zero_distance, const auto& layout) {
    for_each_element(
        f, layout, [](int, int) { return 0; },
        [&](int element, int) {
          bytes.push_back(section + element * kParameter_bytes);
          bytes.push_back(section + (element + zero_distance) * kParameter_bytes);
        });
  };
  if (f.k_axis == KAxis::channel) {
    add(record.k_group(0), HeadDim, channel_parameter_layout<HeadDim>(record));
  } else {
    add(record.k_token_parameters(0), kChunkTokens, token_parameter_layout(record, f.k_group));
  }
  add(record.v_parameters(0), kChunkTokens, token_parameter_layout(record, f.v_group));
  return bytes;
}

// Scales and zeros fill exactly the record's parameter sections: every fp16 used, no code touched.
template <int HeadDim>
void check_coverage(const KvFormat& f) {
  const PageRecord record(f);
  std::vector<char> expected(record.page_bytes() / 2), used(expected.size());
  const auto mark = [&](int begin, int bytes) {
    for (int i = begin / 2; i < (begin + bytes) / 2; ++i) expected.at(i) = 1;
  };
  for (int g = 0; g < (f.k_axis == KAxis::channel ? f.k_groups() : 0); ++g) {
    mark(record.k_group(g), record.k_group_bytes());
  }
  for (int chunk = 0; chunk < f.chunks(); ++chunk) {
    mark(record.v_parameters(chunk), record.v_parameters_bytes());
    mark(record.k_token_parameters(chunk), record.k_token_parameters_bytes());
  }
  for (const int byte : parameter_bytes<HeadDim>(f)) used.at(byte / 2) = 1;
  CHECK(used == expected);
}

TEST_CASE("every legal format: one fp16 or byte per group, in lane order, filling its sections") {
  for (const KvFormat& f : test::legal_formats()) {
    // Codes only move sections; one mix of widths suffices where groups are concerned.
    if (f.k_bits != 4 || f.v_bits != 2) continue;
    CAPTURE(name(f));
    if (f.has_blocks()) {
      check_blocks(f);
      continue;
    }
    if (f.head_dim == 64) check_k<64>(f);
    if (f.head_dim == 128) check_k<128>(f);
    if (f.head_dim == 256) check_k<256>(f);
    check_v(f);
  }
  for (const KvFormat& f : test::legal_formats()) {
    CAPTURE(name(f));
    if (f.has_blocks()) continue;
    if (f.head_dim == 64) check_coverage<64>(f);
    if (f.head_dim == 128) check_coverage<128>(f);
    if (f.head_dim == 256) check_coverage<256>(f);
  }
}

}  // namespace
}  // namespace bitdecoding::layout
