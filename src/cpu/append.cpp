// SPDX-License-Identifier: Apache-2.0
// append_tokens on the CPU. Pages that complete are packed first, their tokens taken from the ring
// and, where a long append never passes through it, from the input; then the newest tokens go to
// the ring (whose rows may be those of tokens just packed) and the first ones to the first rows.
#include <algorithm>
#include <cstring>
#include <vector>

#include "bitdecoding/quantize/growth.hpp"
#include "bitdecoding/run.hpp"
#include "cpu/checks.hpp"
#include "cpu/pack_page.hpp"
#include "cpu/parallel.hpp"

namespace bitdecoding {
namespace {

Status find_growth(const AppendProblem& p, int b, Growth* growth) {
  const PagedKvCache& c = p.cache;
  const std::int64_t length = std::int64_t{c.lengths[b]} + p.runs.count(b);
  if (length > p.max_tokens) {
    return invalid_argument("lengths[", b, "] = ", length, " after the append of ", p.runs.count(b),
                            " tokens; allowed: at most ", p.max_tokens, " (max_tokens)");
  }
  *growth = grow(c, c.lengths[b], c.packed[b], p.runs.count(b));
  if (growth->end_column() > c.max_pages) {
    return invalid_argument("lengths[", b, "] = ", length, " after the append, which fills ",
                            growth->end_column(), " pages; allowed: max_pages (", c.max_pages, ")");
  }
  return {};
}

// Slots that this call writes belong to one sequence each.
Status check_slots(const PagedKvCache& c, const std::vector<Growth>& growths) {
  std::vector<int> owners(static_cast<std::size_t>(c.num_slots), -1);
  const auto grows = [&](int b) {
    const Growth& growth = growths[static_cast<std::size_t>(b)];
    return growth.length > growth.old_length;
  };
  for (int b = 0; b < c.batch; ++b) {
    if (growths[static_cast<std::size_t>(b)].length == 0) continue;
    int& owner = owners[static_cast<std::size_t>(c.slots[b])];
    if (owner < 0) {
      owner = b;
    } else if (grows(b) || grows(owner)) {
      return invalid_argument("slots[", b, "] = ", c.slots[b],
                              "; allowed: a slot of its own (slots[", owner, "] names it too)");
    }
  }
  return {};
}

// Pages that this call writes (sorted by id) hold nothing yet that a sequence attends to.
Status check_unused(const PagedKvCache& c, const std::vector<cpu::PageUse>& pages) {
  for (int b = 0; !pages.empty() && b < c.batch; ++b) {
    for (int column = 0; column < c.packed[b] / c.format.page_tokens; ++column) {
      const int id = c.block_table[std::int64_t{b} * c.max_pages + column];
      const auto same =
          std::lower_bound(pages.begin(), pages.end(), id,
                           [](const cpu::PageUse& page, int wanted) { return page.id < wanted; });
      if (same != pages.end() && same->id == id) {
        return invalid_argument("block_table[", same->sequence, ", ", same->column, "] = ", id,
                                "; allowed: a page that no sequence attends to (block_table[", b,
                                ", ", column, "] names it too)");
      }
    }
  }
  return {};
}

// The new lengths and the pages that this call writes.
Status find_growths(const AppendProblem& p, std::vector<Growth>* growths,
                    std::vector<cpu::PageUse>* pages) {
  const PagedKvCache& c = p.cache;
  for (int b = 0; b < c.batch; ++b) {
    if (Status s = find_growth(p, b, &(*growths)[static_cast<std::size_t>(b)]); !s.is_ok())
      return s;
    const Growth& growth = (*growths)[static_cast<std::size_t>(b)];
    for (int column = growth.first_column(); column < growth.end_column(); ++column) {
      const int id = c.block_table[std::int64_t{b} * c.max_pages + column];
      pages->push_back({b, column, id});
      if (Status s = cpu::check_page_id(pages->back(), c.num_pages); !s.is_ok()) return s;
    }
  }
  if (Status s = check_slots(c, *growths); !s.is_ok()) return s;
  if (Status s = cpu::check_distinct(*pages); !s.is_ok()) return s;
  return check_unused(c, *pages);
}

class Appender {
 public:
  Appender(const AppendProblem& problem, const std::vector<Growth>& growths)
      : p_(problem), c_(problem.cache), growths_(growths) {}

  void pack(const cpu::PageUse& page, int head) const {
    const int tokens = c_.format.page_tokens;
    cpu::TokenTile k, v;
    for (int n = 0; n < tokens; ++n) {
      const int position = page.column * tokens + n;
      fetch(page.sequence, head, 0, position, k.values + n * c_.format.head_dim);
      fetch(page.sequence, head, 1, position, v.values + n * c_.format.head_dim);
    }
    cpu::pack_page(c_.format, page.column == 0 ? c_.keep_first : 0, k, v,
                   c_.pool + c_.page_offset(page.id, head));
  }

  // What stays in fp16.
  void keep(int b, int head) const {
    const Growth& growth = growth_of(b);
    for (int tensor = 0; tensor < 2; ++tensor) {
      std::uint16_t* rows = c_.side + c_.side_offset(c_.slots[b], head, tensor);
      const int first_end = growth.first_end(c_.keep_first);
      for (int position = growth.old_length; position < first_end; ++position) {
        arrive(b, head, tensor, position, row_at(rows, c_.first_row(position)));
      }
      for (int position = growth.tail_begin(); position < growth.length; ++position) {
        arrive(b, head, tensor, position, row_at(rows, c_.tail_row(position)));
      }
    }
  }

 private:
  const Growth& growth_of(int b) const { return growths_[static_cast<std::size_t>(b)]; }
  std::uint16_t* row_at(std::uint16_t* rows, int row) const {
    return rows + static_cast<std::ptrdiff_t>(row) * c_.format.head_dim;
  }

  // A token's fp16 values: from the input if it is new, else from the ring.
  void fetch(int b, int head, int tensor, int position, std::uint16_t* fp16) const {
    if (position >= growth_of(b).old_length) return arrive(b, head, tensor, position, fp16);
    std::uint16_t* rows = c_.side + c_.side_offset(c_.slots[b], head, tensor);
    std::memcpy(fp16, row_at(rows, c_.tail_row(position)),
                static_cast<std::size_t>(c_.format.head_dim) * sizeof(std::uint16_t));
  }

  void arrive(int b, int head, int tensor, int position, std::uint16_t* fp16) const {
    const TokenRows& rows = tensor == 0 ? p_.k : p_.v;
    const int row = p_.runs.begin(b) + position - growth_of(b).old_length;
    cpu::arrive(rows, rows.offset(b, row, head), c_.format.head_dim, c_.arrival(head, tensor),
                fp16);
  }

  const AppendProblem& p_;
  const PagedKvCache& c_;
  const std::vector<Growth>& growths_;
};

}  // namespace

Status append_tokens(const AppendProblem& problem, const CpuExecution& execution) {
  const PagedKvCache& c = problem.cache;
  if (Status status = validate(problem); !status.is_ok()) return status;
  if (Status status = cpu::check_runs(problem.runs); !status.is_ok()) return status;
  if (Status status = check_state(c); !status.is_ok()) return status;
  std::vector<Growth> growths(static_cast<std::size_t>(c.batch));
  std::vector<cpu::PageUse> pages;
  if (Status status = find_growths(problem, &growths, &pages); !status.is_ok()) return status;

  const Appender appender(problem, growths);
  const std::int64_t items = static_cast<std::int64_t>(pages.size()) * c.num_kv_heads;
  const int threads =
      cpu::choose_threads(execution.threads, items, items * cpu::pack_page_ns(c.format));
  cpu::parallel_for(items, threads, [&](std::int64_t item) {
    appender.pack(pages[static_cast<std::size_t>(item / c.num_kv_heads)],
                  static_cast<int>(item % c.num_kv_heads));
  });
  // At most T + F rows of a head: never worth a thread.
  for (int b = 0; b < c.batch; ++b) {
    for (int head = 0; head < c.num_kv_heads; ++head) appender.keep(b, head);
    c.lengths[b] = growths[static_cast<std::size_t>(b)].length;
    c.packed[b] = growths[static_cast<std::size_t>(b)].packed;
  }
  return {};
}

}  // namespace bitdecoding
