// SPDX-License-Identifier: Apache-2.0
// Append: any number of new tokens to each sequence of a cache. Pages that become complete and
// older than the newest keep_last tokens are quantised; the other new tokens go to the side buffer.
// One, many or all tokens at a time give the same pages.
#pragma once

#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/quantize/token_rows.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

struct AppendProblem {
  PagedKvCache cache;
  TokenRows k;  // (B, S, H, D)
  TokenRows v;  // (B, S, H, D)
  TokenRuns runs;
};

// Everything the host can check without reading the arrays.
Status validate(const AppendProblem& problem);

}  // namespace bitdecoding
