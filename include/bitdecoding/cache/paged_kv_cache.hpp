// SPDX-License-Identifier: Apache-2.0
// PagedKvCache: which bytes hold token i of sequence b. A POD view; the caller owns all memory.
//   B sequences, H = num_kv_heads, D = head_dim, P = page_tokens, F = keep_first, T = tail_tokens
// A sequence is attended as  first rows [0, min(F, packed)) | pages [min(F, packed), packed) |
// tail rows [packed, length).  First and tail rows are fp16; pages are packed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "bitdecoding/format/kv_format.hpp"
#include "bitdecoding/format/rotation.hpp"
#include "bitdecoding/layout/page_record.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

inline constexpr int kMaxKeepLast = 1 << 24;  // sums with page and append sizes stay within int

struct PagedKvCache {
  KvFormat format;
  int keep_first = 0;  // F: tokens of the start of every sequence kept in fp16, 0..P
  int keep_last = 0;   // R: at least this many newest tokens stay in fp16

  int batch = 0;         // B
  int num_kv_heads = 0;  // H
  int num_pages = 0;     // of the pool
  int num_slots = 0;     // of the side buffer
  int tail_tokens = 0;   // T: rows of the tail ring, see `min_tail_tokens`
  int max_pages = 0;     // columns of the block table

  std::uint8_t* pool = nullptr;   // [num_pages, H, page_bytes], 16-byte aligned
  std::uint16_t* side = nullptr;  // fp16 [num_slots, H, 2, F + T, D], 16-byte aligned; K, V
  const std::int32_t* block_table = nullptr;  // [B, max_pages] page ids
  const std::int32_t* slots = nullptr;        // [B] rows of the side buffer
  std::int32_t* lengths = nullptr;            // [B] tokens of each sequence
  std::int32_t* packed = nullptr;             // [B] of these in pages; a multiple of P
  // fp16 [H, D], 16-byte aligned, taken from every K on arrival; nullptr: none. The same for all
  // of a cache's life: scores of keys that lack different means don't compare.
  const std::uint16_t* k_mean = nullptr;

  constexpr std::size_t page_offset(std::int64_t page, int head) const {
    return static_cast<std::size_t>(page * num_kv_heads + head) *
           static_cast<std::size_t>(page_bytes(format));
  }
  // Row 0 of K (tensor = 0) or V (tensor = 1) in the side buffer, in elements.
  constexpr std::size_t side_offset(std::int64_t slot, int head, int tensor) const {
    return static_cast<std::size_t>((slot * num_kv_heads + head) * 2 + tensor) *
           static_cast<std::size_t>(keep_first + tail_tokens) *
           static_cast<std::size_t>(format.head_dim);
  }
  // What K (tensor = 0) or V (tensor = 1) of a head goes through on its way to zones and pages.
  constexpr format::Arrival arrival(int head, int tensor) const {
    return format::arrival_of(format, k_mean, head, tensor);
  }
  constexpr int first_row(int token) const { return token; }
  constexpr int tail_row(int token) const { return keep_first + token % tail_tokens; }
};

// Rows a tail ring needs so that the newest keep_last tokens, an unfinished page, and one append or
// rollback of max_append tokens fit.
constexpr int min_tail_tokens(int keep_last, int page_tokens, int max_append) {
  return layout::round_up(keep_last + page_tokens + max_append - 1, 16);
}

// Tokens in pages once a sequence has `length` tokens: whole pages older than the newest keep_last.
// Page sizes are powers of two: kernels needn't divide.
constexpr int packed_tokens(int length, int keep_last, int page_tokens, int packed_before) {
  const int old_tokens = length > keep_last ? length - keep_last : 0;
  return std::max(packed_before, old_tokens & ~(page_tokens - 1));
}

// Everything the host can check of a cache without reading device memory.
inline Status validate(const PagedKvCache& c) {
  if (Status status = validate(c.format); !status.is_ok()) return status;
  if (c.keep_first < 0 || c.keep_first > c.format.page_tokens) {
    return invalid_argument("keep_first = ", c.keep_first, "; allowed: 0 to page_tokens (",
                            c.format.page_tokens, ")");
  }
  if (c.keep_last < 0 || c.keep_last > kMaxKeepLast) {
    return invalid_argument("keep_last = ", c.keep_last, "; allowed: 0 to ", kMaxKeepLast);
  }
  if (c.batch < 0) return invalid_argument("batch = ", c.batch, "; allowed: 0 or more");
  if (c.num_kv_heads < 1) {
    return invalid_argument("num_kv_heads = ", c.num_kv_heads, "; allowed: 1 or more");
  }
  if (c.num_pages < 0 || c.num_slots < 0 || c.max_pages < 0) {
    return invalid_argument("num_pages, num_slots, max_pages = ", c.num_pages, ", ", c.num_slots,
                            ", ", c.max_pages, "; allowed: 0 or more");
  }
  if (c.max_pages > INT32_MAX / c.format.page_tokens) {  // lengths are int32
    return invalid_argument("max_pages = ", c.max_pages, "; allowed: 0 to ",
                            INT32_MAX / c.format.page_tokens);
  }
  const int min_tail = min_tail_tokens(c.keep_last, c.format.page_tokens, 1);
  if (c.tail_tokens < min_tail) {
    return invalid_argument("tail_tokens = ", c.tail_tokens, "; allowed: ", min_tail,
                            " or more (keep_last + page_tokens, rounded up to 16)");
  }
  if (const auto address = reinterpret_cast<std::uintptr_t>(c.pool); address % 16 != 0) {
    return invalid_argument("pool address = ", address, "; allowed: multiples of 16");
  }
  if (const auto address = reinterpret_cast<std::uintptr_t>(c.side); address % 16 != 0) {
    return invalid_argument("side address = ", address, "; allowed: multiples of 16");
  }
  if (const auto address = reinterpret_cast<std::uintptr_t>(c.k_mean); address % 16 != 0) {
    return invalid_argument("k_mean address = ", address, "; allowed: multiples of 16");
  }
  if (c.batch == 0) return {};
  if (c.pool == nullptr && c.num_pages > 0) {
    return invalid_argument("pool = null; allowed: an array [num_pages, num_kv_heads, page_bytes]");
  }
  if (c.side == nullptr && c.num_slots > 0) {
    return invalid_argument("side = null; allowed: an array [num_slots, num_kv_heads, 2, rows, D]");
  }
  if (c.block_table == nullptr && c.max_pages > 0) {
    return invalid_argument("block_table = null; allowed: an array [B, max_pages]");
  }
  const auto present = [](const char* argument, const void* array) {
    return array == nullptr ? invalid_argument(argument, " = null; allowed: an array [B]")
                            : Status();
  };
  if (Status status = present("slots", c.slots); !status.is_ok()) return status;
  if (Status status = present("lengths", c.lengths); !status.is_ok()) return status;
  return present("packed", c.packed);
}

}  // namespace bitdecoding
