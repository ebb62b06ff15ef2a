// SPDX-License-Identifier: Apache-2.0
// Append: any number of new tokens to each sequence of a cache. Pages that become complete and
// older than the newest keep_last tokens are quantised; the other new tokens go to the side buffer.
// One, many or all tokens at a time give the same pages.
#pragma once

#include <limits>

#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/quantize/token_rows.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

struct AppendProblem {
  PagedKvCache cache;
  TokenRows k;  // (B, S, H, D)
  TokenRows v;  // (B, S, H, D)
  TokenRuns runs;
  int max_tokens = std::numeric_limits<int>::max();  // a sequence may not grow beyond
};

// Everything the host can check without reading the arrays.
inline Status validate(const AppendProblem& p) {
  if (Status status = validate(p.cache); !status.is_ok()) return status;
  if (Status status = validate(p.runs, p.k, p.v); !status.is_ok()) return status;
  if (p.runs.batch != p.cache.batch) {
    return invalid_argument("batch of k and v = ", p.runs.batch, "; allowed: ", p.cache.batch,
                            " (batch of the cache)");
  }
  return {};
}

// validate(), and what a launch on a CUDA device asks besides.
inline Status validate_for_cuda(const AppendProblem& p) {
  if (Status status = validate(p); !status.is_ok()) return status;
  return validate_for_cuda(p.runs, p.k, p.v);
}

}  // namespace bitdecoding
