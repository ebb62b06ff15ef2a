// SPDX-License-Identifier: Apache-2.0
// The arrays of one paged cache, checked once and held; what PagedKvCache of Python runs on.
#pragma once

#include <nanobind/nanobind.h>

#include <map>
#include <optional>
#include <string>
#include <utility>

#include "arrays.hpp"
#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/decode/decode_plan.hpp"
#include "bitdecoding/decode/decode_problem.hpp"
#include "execution.hpp"

namespace bitdecoding::python {

// Pages and rows of the tail ring that one sequence of up to max_tokens tokens ever needs.
nb::tuple sequence_extents(const KvFormat& format, int keep_first, int keep_last, int max_tokens);

class CacheArrays {
 public:
  CacheArrays(const KvFormat& format, int keep_first, int keep_last, nb::handle pool,
              nb::handle side, nb::handle block_table, nb::handle slots, nb::handle lengths,
              nb::handle packed, nb::handle k_mean, Lifetime lifetime);

  std::string device() const { return device_name(pool_.device()); }
  // Tokens that a sequence can hold before it needs more columns than the block table has.
  int capacity_tokens() const;
  // Refuses tokens that would make a sequence longer than max_tokens: on a CPU before anything is
  // written, on CUDA that sequence alone and in the error word.
  void append(nb::handle k, nb::handle v, nb::handle leftpad, nb::handle num_tokens, int max_tokens,
              const RunOptions& options);
  void decode(nb::handle q, nb::handle out, nb::handle lse, double softmax_scale,
              const RunOptions& options);
  // Checks the cache with these copies of its tables, which are in CPU memory.
  void check(nb::handle block_table, nb::handle slots, nb::handle lengths, nb::handle packed) const;

  // For CUDA. A bitdecoding.Workspace: where scratch memory comes from when it is first needed.
  void use_workspace(nb::object workspace) { workspace_ = std::move(workspace); }
  nb::object error_word() const { return error_word_object_; }  // None before the first call
  nb::dict plan_decode(int columns, const std::optional<std::string>& kernel) const;

 private:
  struct PlannedDecode {
    const decode::DecodePlan& plan;
    Array workspace;  // of plan.workspace_bytes or more
  };

  void decode_on_cuda(const DecodeProblem& problem, const RunOptions& options, nb::handle q);
  const PlannedDecode& planned_decode(int columns, const std::optional<std::string>& kernel);
  Array decode_memory(std::size_t bytes) const;
  CudaExecution on_cuda(const RunOptions& options, nb::handle tensor);

  Lifetime lifetime_;  // of the arrays, and of what the workspace gives
  Array pool_;
  Array side_;
  Array block_table_;
  Array slots_;
  Array lengths_;
  Array packed_;
  std::optional<Array> k_mean_;
  PagedKvCache cache_;

  nb::object workspace_ = nb::none();
  nb::object error_word_object_ = nb::none();
  std::optional<Array> error_word_;
  std::optional<Array> counters_;
  // By query columns and the kernel that was asked for.
  std::map<std::pair<int, std::optional<std::string>>, PlannedDecode> decodes_;
};

}  // namespace bitdecoding::python
