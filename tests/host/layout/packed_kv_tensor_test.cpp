// SPDX-License-Identifier: Apache-2.0
// Whole pages of every legal format, written through the tensors, read by the independent reader.
#include "bitdecoding/layout/packed_kv_tensor.hpp"

#include <doctest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "legal_formats.hpp"
#include "page_reader.hpp"

namespace bitdecoding::layout {
namespace {

constexpr int kGuard_bytes = 64;

// A record between two guards, all bytes `fill`.
struct GuardedRecord {
  struct alignas(16) Line {
    std::uint8_t bytes[16];
  };
  std::vector<Line> lines;

  GuardedRecord(int bytes, std::uint8_t fill) : lines((bytes + 2 * kGuard_bytes) / sizeof(Line)) {
    std::fill_n(lines.data()->bytes, bytes + 2 * kGuard_bytes, fill);
  }
  std::uint8_t* data() { return lines.data()->bytes + kGuard_bytes; }
};

// What the tests store at place i of a kind of data: neighbours differ, all bits occur.
std::uint32_t content(int i, int kind) {
  const std::uint32_t mixed = (static_cast<std::uint32_t>(i) * 8 + kind) * 2654435761u;
  return mixed >> 16 ^ mixed >> 7;
}
cutlass::half_t half_bits(std::uint32_t bits) {
  return cutlass::half_t::bitcast(static_cast<std::uint16_t>(bits));
}

// Numbers of the groups that (token, channel) belongs to.
int k_group_of(const KvFormat& f, int token, int channel) {
  return f.k_axis == KAxis::channel ? token / f.k_group * f.head_dim + channel
                                    : token * f.k_groups() + channel / f.k_group;
}
int v_group_of(const KvFormat& f, int token, int channel) {
  return token * f.v_groups() + channel / f.v_group;
}

template <PageConfig C>
void write(const KvFormat& f, std::uint8_t* bytes) {
  const PackedKvPage<C> page(PageRecord(f), bytes);
  auto k_codes = page.k_codes();
  auto v_codes = page.v_codes();
  for (int token = 0; token < f.page_tokens; ++token) {
    for (int channel = 0; channel < f.head_dim; ++channel) {
      const int i = token * f.head_dim + channel;
      k_codes(token, channel) = Code<C.k_bits>(content(i, 0) % (1 << C.k_bits));
      v_codes(token, channel) = Code<C.v_bits>(content(i, 1) % (1 << C.v_bits));
      const int k = k_group_of(f, token, channel), v = v_group_of(f, token, channel);
      if constexpr (C.has_blocks()) {
        page.k_exponents()(token, channel) = static_cast<std::uint8_t>(content(k, 2));
        page.v_exponents()(token, channel) = static_cast<std::uint8_t>(content(v, 4));
      } else {
        page.k_scales()(token, channel) = half_bits(content(k, 2));
        page.k_zeros()(token, channel) = half_bits(content(k, 3));
        page.v_scales()(token, channel) = half_bits(content(v, 4));
        page.v_zeros()(token, channel) = half_bits(content(v, 5));
      }
    }
    if (f.token_norm) page.token_norms()(token) = half_bits(content(token, 6));
  }
}

// How many elements the reader, or the read-only tensors, see differently from what was written.
template <PageConfig C>
int differences(const KvFormat& f, const std::uint8_t* bytes) {
  const test::PageReader r{f, bytes};
  const PackedKvPage<C, const std::uint8_t> page(PageRecord(f), bytes);
  const auto k_codes = page.k_codes();
  const auto v_codes = page.v_codes();
  int bad = 0;
  for (int token = 0; token < f.page_tokens; ++token) {
    for (int channel = 0; channel < f.head_dim; ++channel) {
      const int i = token * f.head_dim + channel;
      const std::uint32_t k_code = content(i, 0) % (1 << C.k_bits);
      const std::uint32_t v_code = content(i, 1) % (1 << C.v_bits);
      bad += r.code(r.k_place(token, channel), C.k_bits) != k_code;
      bad += r.code(r.v_place(token, channel), C.v_bits) != v_code;
      bad += std::uint8_t(Code<C.k_bits>(k_codes(token, channel))) != k_code;
      bad += std::uint8_t(Code<C.v_bits>(v_codes(token, channel))) != v_code;
      const int k = k_group_of(f, token, channel), v = v_group_of(f, token, channel);
      const auto differs = [&](int offset, const cutlass::half_t& element, int group, int kind) {
        const auto bits = static_cast<std::uint16_t>(content(group, kind));
        return r.fp16(offset) != bits || element.raw() != bits;
      };
      if constexpr (C.has_blocks()) {
        const auto k_exponent = static_cast<std::uint8_t>(content(k, 2));
        const auto v_exponent = static_cast<std::uint8_t>(content(v, 4));
        bad += bytes[r.k_exponent(token, channel)] != k_exponent;
        bad += bytes[r.v_exponent(token, channel)] != v_exponent;
        bad += page.k_exponents()(token, channel) != k_exponent;
        bad += page.v_exponents()(token, channel) != v_exponent;
      } else {
        bad += differs(r.k_scale(token, channel), page.k_scales()(token, channel), k, 2);
        bad += differs(r.k_zero(token, channel), page.k_zeros()(token, channel), k, 3);
        bad += differs(r.v_scale(token, channel), page.v_scales()(token, channel), v, 4);
        bad += differs(r.v_zero(token, channel), page.v_zeros()(token, channel), v, 5);
      }
    }
    if (f.token_norm) bad += r.fp16(r.norm(token)) != (content(token, 6) & 0xffff);
  }
  return bad;
}

// Whether `units` tile [begin, begin + bytes) of the page, each aligned to its own size.
bool tiles_exactly(const auto& units, const std::uint8_t* begin, int bytes) {
  using Unit = std::remove_cvref_t<decltype(units(0, 0, 0))>;
  std::vector<int> seen(bytes / sizeof(Unit));
  if (static_cast<int>(cute::size(units) * sizeof(Unit)) != bytes) return false;
  for (int i = 0; i < static_cast<int>(cute::size(units)); ++i) {
    const auto distance = reinterpret_cast<const std::uint8_t*>(&units(i)) - begin;
    if (distance < 0 || distance >= bytes || distance % sizeof(Unit) != 0) return false;
    ++seen[distance / sizeof(Unit)];
  }
  return std::count(seen.begin(), seen.end(), 1) == static_cast<std::ptrdiff_t>(seen.size());
}

template <PageConfig C>
void check_format(const KvFormat& f) {
  const PageRecord record(f);
  GuardedRecord zeros(record.page_bytes(), 0x00), ones(record.page_bytes(), 0xff);
  write<C>(f, zeros.data());
  write<C>(f, ones.data());
  CHECK(differences<C>(f, zeros.data()) == 0);
  // What was there before shows nowhere in the record, and everywhere outside.
  CHECK(std::equal(zeros.data(), zeros.data() + record.page_bytes(), ones.data()));
  for (int i = 1; i <= kGuard_bytes; ++i) {
    const int after = record.page_bytes() + i - 1;
    REQUIRE((zeros.data()[-i] == 0x00 && zeros.data()[after] == 0x00));
    REQUIRE((ones.data()[-i] == 0xff && ones.data()[after] == 0xff));
  }
  const PackedKvPage<C> page(record, zeros.data());
  for (int chunk = 0; chunk < f.chunks(); ++chunk) {
    CHECK(tiles_exactly(page.k_units(chunk), zeros.data() + record.k_codes(chunk),
                        record.k_codes_bytes()));
    CHECK(tiles_exactly(page.v_units(chunk), zeros.data() + record.v_codes(chunk),
                        record.v_codes_bytes()));
  }
}

// The 24 compile-time configurations.
constexpr PageConfig config(int i) {
  return {.k_bits = i & 1 ? 4 : 2,
          .v_bits = i & 2 ? 4 : 2,
          .k_axis = static_cast<KAxis>(i / 4 % 3),
          .head_dim = 64 << i / 12};
}

template <int... I>
int check_all(std::integer_sequence<int, I...>) {
  int checked = 0;
  for (const KvFormat& f : test::legal_formats()) {
    CAPTURE(name(f));
    ((config(I) == page_config(f) ? (check_format<config(I)>(f), ++checked) : 0), ...);
  }
  return checked;
}

TEST_CASE(
    "every legal format: what the tensors write is where docs/format.md says, and all of it") {
  CHECK(check_all(std::make_integer_sequence<int, 36>{}) == 696);
}

}  // namespace
}  // namespace bitdecoding::layout
