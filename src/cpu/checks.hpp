// SPDX-License-Identifier: Apache-2.0
// Checks that read a call's index arrays on the host, before anything is written.
#pragma once

#include <cstdint>
#include <vector>

#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/quantize/token_rows.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding::cpu {

// leftpad and num_tokens against the tokens of a row.
Status check_runs(const TokenRuns& runs);

// One page that a call reads or writes.
struct PageUse {
  int sequence;
  int column;  // of the block table
  int id;      // of the pool
};

Status check_page_id(const PageUse& use, int num_pages);

// Pages that a call writes must differ. `uses` is sorted by id on return.
Status check_distinct(std::vector<PageUse>& uses);

}  // namespace bitdecoding::cpu
