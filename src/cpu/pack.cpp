// SPDX-License-Identifier: Apache-2.0
// pack_pages on the CPU: one item is one page of one head.
#include <vector>

#include "bitdecoding/run.hpp"
#include "cpu/checks.hpp"
#include "cpu/pack_page.hpp"
#include "cpu/parallel.hpp"

namespace bitdecoding {
namespace {

Status find_pages(const PackProblem& p, std::vector<cpu::PageUse>* pages) {
  for (int b = 0; b < p.runs.batch; ++b) {
    const int first = p.first_page == nullptr ? 0 : p.first_page[b];
    const int count = p.runs.count(b) / p.format.page_tokens;
    if (first < 0 || first > p.max_pages - count) {
      return invalid_argument("first_page[", b, "] = ", first, "; allowed: 0 to ",
                              p.max_pages - count, " (max_pages ", p.max_pages, " - ", count,
                              " new pages)");
    }
    for (int column = first; column < first + count; ++column) {
      const int id = p.block_table[std::int64_t{b} * p.max_pages + column];
      pages->push_back({b, column, id});
      if (Status s = cpu::check_page_id(pages->back(), p.num_pages); !s.is_ok()) return s;
    }
  }
  return cpu::check_distinct(*pages);
}

void pack_one(const PackProblem& p, const cpu::PageUse& page, int head) {
  const int tokens = p.format.page_tokens;
  const int head_dim = p.format.head_dim;
  const int first = p.first_page == nullptr ? 0 : p.first_page[page.sequence];
  const int row = p.runs.begin(page.sequence) + (page.column - first) * tokens;
  cpu::TokenTile k, v;
  const auto arrive = [&](const TokenRows& rows, int tensor, int n, cpu::TokenTile& tile) {
    cpu::arrive(rows, rows.offset(page.sequence, row + n, head), head_dim,
                format::arrival_of(p.format, p.k_mean, head, tensor), tile.values + n * head_dim);
  };
  for (int n = 0; n < tokens; ++n) {
    arrive(p.k, 0, n, k);
    arrive(p.v, 1, n, v);
  }
  const std::int64_t record = std::int64_t{page.id} * p.num_kv_heads + head;
  cpu::pack_page(p.format, page.column == 0 ? p.keep_first : 0, k, v,
                 p.pool + record * page_bytes(p.format));
}

}  // namespace

Status pack_pages(const PackProblem& problem, const CpuExecution& execution) {
  if (Status status = validate(problem); !status.is_ok()) return status;
  if (Status status = cpu::check_runs(problem.runs); !status.is_ok()) return status;
  std::vector<cpu::PageUse> pages;
  if (Status status = find_pages(problem, &pages); !status.is_ok()) return status;

  const int heads = problem.num_kv_heads;
  const std::int64_t items = static_cast<std::int64_t>(pages.size()) * heads;
  const int threads =
      cpu::choose_threads(execution.threads, items, items * cpu::pack_page_ns(problem.format));
  cpu::parallel_for(items, threads, [&](std::int64_t item) {
    pack_one(problem, pages[static_cast<std::size_t>(item / heads)],
             static_cast<int>(item % heads));
  });
  return {};
}

}  // namespace bitdecoding
