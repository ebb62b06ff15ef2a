// SPDX-License-Identifier: Apache-2.0
// What an append does to one sequence: which pages become complete, which new tokens stay in fp16.
//   pages  [0, old_packed) are there | [old_packed, packed) are filled now, from the ring up to
//          old_length and from the input behind it
//   rows   the first ones take new tokens below keep_first, the ring those from tail_begin() on
// Pure and the same on host and device.
#pragma once

#include <cstdint>

#include "bitdecoding/cache/sequence_state.hpp"

namespace bitdecoding {

struct Growth {
  int page_tokens = 0;
  int old_length = 0;
  int length = 0;
  int old_packed = 0;
  int packed = 0;

  constexpr bool fills_pages() const { return old_packed < packed; }
  // Columns of the block table: pages [first_column, end_column) are filled, of which those from
  // new_column on hold new tokens alone.
  constexpr int first_column() const { return pages(old_packed); }
  constexpr int end_column() const { return pages(packed); }
  constexpr int new_column() const {
    const int partly = (old_length & (page_tokens - 1)) != 0 ? 1 : 0;
    const int behind_ring = pages(old_length) + partly;
    return behind_ring < end_column() ? behind_ring : end_column();
  }

  // New tokens [old_length, first_end) go to the first rows, [tail_begin, length) to the ring.
  constexpr int first_end(int keep_first) const {
    return keep_first < length ? keep_first : length;
  }
  constexpr int tail_begin() const { return packed > old_length ? packed : old_length; }

 private:
  // Page sizes are powers of two: kernels needn't divide.
  constexpr int pages(int tokens) const { return tokens >> (page_tokens == 64 ? 6 : 7); }
};

// `count` more tokens; their sum must be an int.
constexpr Growth grow(const PagedKvCache& c, int length, int packed, int count) {
  const int page_tokens = c.format.page_tokens;
  return {page_tokens, length, length + count, packed,
          packed_tokens(length + count, c.keep_last, page_tokens, packed)};
}

// No append of `row_tokens` fills more pages of new tokens alone.
constexpr int most_new_pages(const PagedKvCache& c, int row_tokens) {
  return (row_tokens > c.keep_last ? row_tokens - c.keep_last : 0) / c.format.page_tokens;
}

// A sequence in a sound state must stay within the cache.
constexpr Fault find_growth_fault(const PagedKvCache& c, const SequenceState& s, int count,
                                  int max_tokens) {
  const std::int64_t length = std::int64_t{s.length} + count;
  if (length > max_tokens) {
    return {DeviceError::grown_length, saturate_to_int(length), max_tokens};
  }
  const int pages = grow(c, s.length, s.packed, count).end_column();
  if (pages > c.max_pages) return {DeviceError::grown_pages, pages, c.max_pages};
  return {};
}

}  // namespace bitdecoding
