// SPDX-License-Identifier: Apache-2.0
#include "cpu/checks.hpp"

#include <algorithm>

#include "bitdecoding/run.hpp"

namespace bitdecoding {
namespace cpu {

Status check_runs(const TokenRuns& runs) {
  for (int b = 0; b < runs.batch; ++b) {
    const int begin = runs.begin(b);
    if (begin < 0 || begin > runs.row_tokens) {
      return invalid_argument("leftpad[", b, "] = ", begin, "; allowed: 0 to ", runs.row_tokens,
                              " (tokens of a row)");
    }
    const int count = runs.count(b);
    if (count < 0 || count > runs.row_tokens - begin) {
      return invalid_argument("num_tokens[", b, "] = ", count, "; allowed: 0 to ",
                              runs.row_tokens - begin, " (tokens of a row behind leftpad)");
    }
  }
  return {};
}

Status check_page_id(const PageUse& use, int num_pages) {
  if (use.id >= 0 && use.id < num_pages) return {};
  return invalid_argument("block_table[", use.sequence, ", ", use.column, "] = ", use.id,
                          "; allowed: 0 to ", num_pages - 1, " (pages of the pool)");
}

Status check_distinct(std::vector<PageUse>& uses) {
  std::stable_sort(uses.begin(), uses.end(),
                   [](const PageUse& a, const PageUse& b) { return a.id < b.id; });
  const auto same = std::adjacent_find(
      uses.begin(), uses.end(), [](const PageUse& a, const PageUse& b) { return a.id == b.id; });
  if (same == uses.end()) return {};
  return invalid_argument("block_table[", same[1].sequence, ", ", same[1].column, "] = ", same->id,
                          "; allowed: a page of its own (block_table[", same->sequence, ", ",
                          same->column, "] names it too)");
}

namespace {

Status check_sequence(const PagedKvCache& c, int b) {
  const int page_tokens = c.format.page_tokens;
  const int length = c.lengths[b];
  const int packed = c.packed[b];
  if (c.slots[b] < 0 || c.slots[b] >= c.num_slots) {
    return invalid_argument("slots[", b, "] = ", c.slots[b], "; allowed: 0 to ", c.num_slots - 1,
                            " (slots of the side buffer)");
  }
  if (length < 0) return invalid_argument("lengths[", b, "] = ", length, "; allowed: 0 or more");
  if (packed < 0 || packed > length || packed % page_tokens != 0) {
    return invalid_argument("packed[", b, "] = ", packed, "; allowed: multiples of page_tokens (",
                            page_tokens, ") from 0 to lengths[", b, "] (", length, ")");
  }
  if (length - packed > c.tail_tokens) {
    return invalid_argument("lengths[", b, "] = ", length, "; allowed: at most ",
                            packed + c.tail_tokens, " (packed + tail_tokens)");
  }
  if (packed / page_tokens > c.max_pages) {
    return invalid_argument("packed[", b, "] = ", packed, "; allowed: at most ",
                            std::int64_t{c.max_pages} * page_tokens, " (max_pages * page_tokens)");
  }
  for (int column = 0; column < packed / page_tokens; ++column) {
    const int id = c.block_table[std::int64_t{b} * c.max_pages + column];
    if (Status status = check_page_id({b, column, id}, c.num_pages); !status.is_ok()) return status;
  }
  return {};
}

}  // namespace
}  // namespace cpu

Status check_state(const PagedKvCache& cache) {
  if (Status status = validate(cache); !status.is_ok()) return status;
  for (int b = 0; b < cache.batch; ++b) {
    if (Status status = cpu::check_sequence(cache, b); !status.is_ok()) return status;
  }
  return {};
}

}  // namespace bitdecoding
