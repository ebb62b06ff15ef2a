// SPDX-License-Identifier: Apache-2.0
// One sequence's device state, and the rules that it must keep before anything is addressed by it:
// those of check_state, but for page ids.
#pragma once

#include <cstdint>
#include <limits>

#include "bitdecoding/cache/device_error.hpp"
#include "bitdecoding/cache/paged_kv_cache.hpp"

namespace bitdecoding {

struct SequenceState {
  int length;
  int packed;
  int slot;
};

// The nearest int: error words hold no wider numbers.
constexpr int saturate_to_int(std::int64_t value) {
  constexpr std::int64_t top = std::numeric_limits<int>::max();
  return static_cast<int>(value < top ? value : top);
}

constexpr Fault find_fault(const PagedKvCache& c, const SequenceState& s) {
  const std::int64_t table_tokens = std::int64_t{c.max_pages} * c.format.page_tokens;
  const Fault packed{DeviceError::packed, s.packed, saturate_to_int(table_tokens)};
  if (s.slot < 0 || s.slot >= c.num_slots) return {DeviceError::slot, s.slot, c.num_slots};
  if (s.length < 0) return {DeviceError::length, s.length, c.tail_tokens};
  // Page sizes are powers of two: kernels needn't divide.
  const int beyond_pages = s.packed & (c.format.page_tokens - 1);
  if (s.packed < 0 || s.packed > s.length || beyond_pages != 0) return packed;
  const int behind_pages = s.length - s.packed;
  if (behind_pages > c.tail_tokens) return {DeviceError::length, behind_pages, c.tail_tokens};
  if (s.packed > table_tokens) return packed;
  return {};
}

// Whether find_fault finds one, in a few operations without branches: what kernels ask first. An
// unsigned comparison catches what is negative, too.
constexpr bool has_fault(const PagedKvCache& c, const SequenceState& s) {
  const auto is_above = [](std::uint32_t value, int limit) {
    return value > static_cast<std::uint32_t>(limit);
  };
  const auto length = static_cast<std::uint32_t>(s.length);
  const auto packed = static_cast<std::uint32_t>(s.packed);
  const std::uint32_t pages = packed >> (c.format.page_tokens == 64 ? 6 : 7);
  const int bad_slot =
      static_cast<std::uint32_t>(s.slot) >= static_cast<std::uint32_t>(c.num_slots);
  const int bad_packed =
      is_above(pages, c.max_pages) | ((s.packed & (c.format.page_tokens - 1)) != 0);
  return (bad_slot | bad_packed | is_above(length - packed, c.tail_tokens)) != 0;
}

}  // namespace bitdecoding
