// SPDX-License-Identifier: Apache-2.0
// Checks the arrays of a cache and of each call, then runs the call without the interpreter lock.
#include "cache_arrays.hpp"

#include <algorithm>
#include <climits>

#include "bitdecoding/decode/decode_problem.hpp"
#include "bitdecoding/quantize/append_problem.hpp"
#include "bitdecoding/run.hpp"

namespace bitdecoding::python {

namespace {

using layout::kSectionAlignment_bytes;

// Runs the library's work while other Python threads run.
template <class Work>
void run(const Work& work) {
  Status status;
  {
    nb::gil_scoped_release release;
    status = work();
  }
  throw_if_error(status);
}

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
                         nb::handle lengths, nb::handle packed)
    : pool_(pool, "pool", Access::write),
      side_(side, "side", Access::write),
      block_table_(block_table, "block_table", Access::read),
      slots_(slots, "slots", Access::read),
      lengths_(lengths, "lengths", Access::write),
      packed_(packed, "packed", Access::write) {
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
            .packed = packed_.writable<std::int32_t>()};
  throw_if_error(validate(cache_));
}

int CacheArrays::capacity_tokens() const {
  const std::int64_t page_tokens = cache_.format.page_tokens;
  const std::int64_t tokens = (cache_.max_pages + 1) * page_tokens - 1 + cache_.keep_last;
  return static_cast<int>(std::min<std::int64_t>(tokens, INT_MAX));
}

void CacheArrays::append(nb::handle k, nb::handle v, nb::handle leftpad, nb::handle num_tokens,
                         int max_tokens, int threads) {
  const TokenArrays tokens(k, v, leftpad, num_tokens, pool_, cache_.format.head_dim);
  expect_cpu("append");
  const AppendProblem problem{.cache = cache_,
                              .k = tokens.k(),
                              .v = tokens.v(),
                              .runs = tokens.runs(),
                              .max_tokens = max_tokens};
  const CpuExecution execution{.threads = threads};
  run([&] { return append_tokens(problem, execution); });
}

void CacheArrays::decode(nb::handle q, nb::handle out, nb::handle lse, double softmax_scale,
                         int threads) {
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
  expect_cpu("decode");
  const CpuExecution execution{.threads = threads};
  run([&] { return bitdecoding::decode_attention(problem, execution); });
}

void CacheArrays::check() const {
  expect_cpu("check");
  throw_if_error(check_state(cache_));
}

void CacheArrays::expect_cpu(const char* operation) const {
  if (!pool_.device().is_cuda) return;
  throw_if_error(Status(StatusCode::unsupported,
                        join(operation, ": this release has no CUDA kernel for it; arrays on ",
                             device_name(pool_.device()), "; allowed: cpu")));
}

}  // namespace bitdecoding::python
