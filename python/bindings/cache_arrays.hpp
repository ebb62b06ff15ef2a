// SPDX-License-Identifier: Apache-2.0
// The arrays of one paged cache, checked once and held; what PagedKvCache of Python runs on.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

#include "arrays.hpp"
#include "bitdecoding/cache/paged_kv_cache.hpp"

namespace bitdecoding::python {

// Pages and rows of the tail ring that one sequence of up to max_tokens tokens ever needs.
nb::tuple sequence_extents(const KvFormat& format, int keep_first, int keep_last, int max_tokens);

class CacheArrays {
 public:
  CacheArrays(const KvFormat& format, int keep_first, int keep_last, nb::handle pool,
              nb::handle side, nb::handle block_table, nb::handle slots, nb::handle lengths,
              nb::handle packed);

  // Tokens that a sequence can hold before it needs more columns than the block table has.
  int capacity_tokens() const;
  // Refuses tokens that would make a sequence longer than max_tokens before anything is written.
  void append(nb::handle k, nb::handle v, nb::handle leftpad, nb::handle num_tokens, int max_tokens,
              int threads);
  void decode(nb::handle q, nb::handle out, nb::handle lse, double softmax_scale, int threads);
  void check() const;

 private:
  void expect_cpu(const char* operation) const;

  Array pool_;
  Array side_;
  Array block_table_;
  Array slots_;
  Array lengths_;
  Array packed_;
  PagedKvCache cache_;
};

}  // namespace bitdecoding::python
