// SPDX-License-Identifier: Apache-2.0
// Checks the arrays of a cache and of each call, then runs the call without the interpreter lock.
#include "cache_arrays.hpp"

#include <algorithm>
#include <climits>

#include "bitdecoding/quantize/append_problem.hpp"
#include "bitdecoding/run.hpp"
#include "decode_plans.hpp"

namespace bitdecoding::python {

namespace {

using layout::kSectionAlignment_bytes;

}  // namespace

nb::tuple sequence_extents(const KvFormat& format, int keep_first, int keep_last, int max_tokens) {
  const int page_tokens = format.page_tokens;
  const PagedKvCache empty{.format = format,
                           .keep_first = keep_first,
                           .keep_last = keep_last,
                           .num_kv_heads = 1,
                           .tail_tokens = min_tail_tokens(keep_last, page_tokens, 1)};
  throw_if_error(validate(empty));
  return nb::make_tuple(packed_tokens(max_tokens, keep_last, page_tokens, 0) / page_tokens,
                        empty.tail_tokens);
}

CacheArrays::CacheArrays(const KvFormat& format, int keep_first, int keep_last, nb::handle pool,
                         nb::handle side, nb::handle block_table, nb::handle slots,
                         nb::handle lengths, nb::handle packed, nb::handle k_mean,
                         Lifetime lifetime)
    : lifetime_(lifetime),
      pool_(pool, "pool", Access::write, lifetime),
      side_(side, "side", Access::write, lifetime),
      block_table_(block_table, "block_table", Access::read, lifetime),
      slots_(slots, "slots", Access::read, lifetime),
      lengths_(lengths, "lengths", Access::write, lifetime),
      packed_(packed, "packed", Access::write, lifetime) {
  pool_.expect_bytes();
  pool_.expect_shape("(num_pages, num_kv_heads, page_bytes)", {kAny, kAny, page_bytes(format)});
  pool_.expect_address(kSectionAlignment_bytes);
  const int heads = pool_.extent(1);
  side_.expect_float16().expect_address(kSectionAlignment_bytes);
  side_.expect_shape("(num_slots, num_kv_heads, 2, keep_first + tail_tokens, head_dim)",
                     {kAny, heads, 2, kAny, format.head_dim});
  lengths_.expect_int32().expect_shape("(batch,)", {kAny});
  const int batch = lengths_.extent(0);
  packed_.expect_int32().expect_shape("(batch,)", {batch});
  slots_.expect_int32().expect_shape("(batch,)", {batch});
  block_table_.expect_int32().expect_shape("(batch, max_pages)", {batch, kAny});
  for (const Array* array : {&pool_, &side_, &block_table_, &slots_, &lengths_, &packed_}) {
    array->expect_contiguous().expect_on(pool_);
  }
  k_mean_ = optional_mean(k_mean, pool_, format.head_dim, lifetime);
  cache_ = {.format = format,
            .keep_first = keep_first,
            .keep_last = keep_last,
            .batch = batch,
            .num_kv_heads = heads,
            .num_pages = pool_.extent(0),
            .num_slots = side_.extent(0),
            .tail_tokens = side_.extent(3) - keep_first,
            .max_pages = block_table_.extent(1),
            .pool = pool_.writable<std::uint8_t>(),
            .side = side_.writable<std::uint16_t>(),
            .block_table = static_cast<const std::int32_t*>(block_table_.data()),
            .slots = static_cast<const std::int32_t*>(slots_.data()),
            .lengths = lengths_.writable<std::int32_t>(),
            .packed = packed_.writable<std::int32_t>(),
            .k_mean = mean_or_null(k_mean_)};
  throw_if_error(validate(cache_));
}

int CacheArrays::capacity_tokens() const {
  const std::int64_t page_tokens = cache_.format.page_tokens;
  const std::int64_t tokens = (cache_.max_pages + 1) * page_tokens - 1 + cache_.keep_last;
  return static_cast<int>(std::min<std::int64_t>(tokens, INT_MAX));
}

void CacheArrays::append(nb::handle k, nb::handle v, nb::handle leftpad, nb::handle num_tokens,
                         int max_tokens, const RunOptions& options) {
  const TokenArrays tokens(k, v, leftpad, num_tokens, pool_, cache_.format.head_dim);
  const AppendProblem problem{.cache = cache_,
                              .k = tokens.k(),
                              .v = tokens.v(),
                              .runs = tokens.runs(),
                              .max_tokens = max_tokens};
  if (!pool_.device().is_cuda) {
    const CpuExecution execution = cpu_execution(pool_, options);
    return run([&] {
      return options.checks_only ? validate(problem) : append_tokens(problem, execution);
    });
  }
  const CudaExecution execution = on_cuda(options, k);
  if (!counters_) {
    counters_.emplace(workspace_.attr("append_counters")(cache_.batch), "counters", Access::write,
                      lifetime_);
    counters_->expect_int32().expect_elements(cache_.batch).expect_contiguous().expect_on(pool_);
  }
  int* counters = counters_->writable<int>();
  run([&] {
    return options.checks_only ? validate_for_cuda(problem)
                               : append_tokens(problem, counters, execution);
  });
}

void CacheArrays::decode(nb::handle q, nb::handle out, nb::handle lse, double softmax_scale,
                         const RunOptions& options) {
  const Array queries(q, "q", Access::read);
  queries.expect_shape("(batch, query_tokens, query_heads, head_dim)",
                       {cache_.batch, kAny, kAny, cache_.format.head_dim});
  queries.expect_unit_stride().expect_on(pool_);
  DecodeProblem problem{.cache = cache_,
                        .query_tokens = queries.extent(1),
                        .query_heads = queries.extent(2),
                        .softmax_scale = static_cast<float>(softmax_scale),
                        .type = queries.element_type(),
                        .q = queries.data(),
                        .q_batch_stride = queries.stride(0),
                        .q_token_stride = queries.stride(1),
                        .q_head_stride = queries.stride(2)};
  const Array output(out, "out", Access::write);
  output.expect_same_dtype(queries).expect_shape(
      "q's shape",
      {cache_.batch, problem.query_tokens, problem.query_heads, cache_.format.head_dim});
  output.expect_contiguous().expect_on(queries);
  problem.out = output.writable<void>();
  std::optional<Array> log_sums;
  if (!lse.is_none()) {
    log_sums.emplace(lse, "lse", Access::write);
    log_sums->expect_float32().expect_shape(
        "(batch, query_heads, query_tokens)",
        {cache_.batch, problem.query_heads, problem.query_tokens});
    log_sums->expect_contiguous().expect_on(queries);
    problem.lse = log_sums->writable<float>();
  }
  if (!pool_.device().is_cuda) {
    const CpuExecution execution = cpu_execution(pool_, options);
    return run([&] {
      return options.checks_only ? validate(problem) : decode_attention(problem, execution);
    });
  }
  decode_on_cuda(problem, options, q);
}

void CacheArrays::decode_on_cuda(const DecodeProblem& problem, const RunOptions& options,
                                 nb::handle q) {
  throw_if_error(validate_for_cuda(problem));  // before there is a plan for such queries
  if (cache_.batch == 0 || problem.query_tokens == 0) return;
  const CudaExecution execution = on_cuda(options, q);
  if (options.checks_only) return (void)decode_memory(0);
  const int columns = problem.query_tokens * (problem.query_heads / cache_.num_kv_heads);
  const PlannedDecode& planned = planned_decode(columns, options.kernel);
  void* workspace = planned.workspace.writable<void>();
  run([&] { return decode_attention(problem, planned.plan, workspace, execution); });
}

void CacheArrays::check(nb::handle block_table, nb::handle slots, nb::handle lengths,
                        nb::handle packed) const {
  const int batch = cache_.batch;
  const Array table(block_table, "block_table", Access::read);
  table.expect_int32().expect_shape("(batch, max_pages)", {batch, cache_.max_pages});
  const Array slot_ids(slots, "slots", Access::read);
  const Array tokens(lengths, "lengths", Access::read);
  const Array packed_tokens(packed, "packed", Access::read);
  for (const Array* ints : {&slot_ids, &tokens, &packed_tokens}) {
    ints->expect_int32().expect_shape("(batch,)", {batch}).expect_contiguous().expect_on(table);
  }
  PagedKvCache copy = cache_;
  copy.block_table = static_cast<const std::int32_t*>(table.data());
  copy.slots = static_cast<const std::int32_t*>(slot_ids.data());
  copy.lengths = const_cast<std::int32_t*>(static_cast<const std::int32_t*>(tokens.data()));
  copy.packed = const_cast<std::int32_t*>(static_cast<const std::int32_t*>(packed_tokens.data()));
  throw_if_error(check_state(copy));  // reads these four alone
}

nb::dict CacheArrays::plan_decode(int columns, const std::optional<std::string>& kernel) const {
  if (!pool_.device().is_cuda) {
    refuse_value("plan_decode: device = ", device(), "; allowed: a cache on cuda");
  }
  return plan_facts(decode_plan(cache_.format, columns, kernel, pool_.device().index));
}

const CacheArrays::PlannedDecode& CacheArrays::planned_decode(
    int columns, const std::optional<std::string>& kernel) {
  const auto key = std::pair(columns, kernel);
  if (const auto found = decodes_.find(key); found != decodes_.end()) return found->second;
  const decode::DecodePlan& plan =
      decode_plan(cache_.format, columns, kernel, pool_.device().index);
  return decodes_.try_emplace(key, plan, decode_memory(plan.workspace_bytes)).first->second;
}

Array CacheArrays::decode_memory(std::size_t bytes) const {
  Array workspace(workspace_.attr("decode_memory")(bytes), "workspace", Access::write, lifetime_);
  workspace.expect_bytes().expect_elements(static_cast<std::int64_t>(bytes)).expect_contiguous();
  workspace.expect_on(pool_);
  return workspace;
}

CudaExecution CacheArrays::on_cuda(const RunOptions& options, nb::handle tensor) {
  CudaExecution execution = cuda_execution(pool_, options, tensor);
  if (!error_word_) {
    error_word_object_ = workspace_.attr("error_word")();
    error_word_ = import_error_word(error_word_object_, pool_, lifetime_);
  }
  execution.error_word = error_word_->writable<int>();
  return execution;
}

}  // namespace bitdecoding::python
