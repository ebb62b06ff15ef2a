// SPDX-License-Identifier: Apache-2.0
// Checks the arrays of a prefill pack and hands it to the back end of their device.
#include "pack_arrays.hpp"

#include "arrays.hpp"
#include "bitdecoding/layout/page_record.hpp"
#include "bitdecoding/quantize/pack_problem.hpp"
#include "bitdecoding/run.hpp"

namespace bitdecoding::python {

void pack_arrays(nb::handle k, nb::handle v, nb::handle pool, nb::handle block_table,
                 const KvFormat& format, int keep_first, nb::handle first_page, nb::handle leftpad,
                 nb::handle num_tokens, nb::handle k_mean, const RunOptions& options,
                 nb::handle error_word) {
  const Array pages(pool, "pool", Access::write);
  pages.expect_bytes().expect_contiguous().expect_address(layout::kSectionAlignment_bytes);
  pages.expect_shape("(num_pages, num_kv_heads, page_bytes)", {kAny, kAny, page_bytes(format)});
  const int heads = pages.extent(1);
  const TokenArrays tokens(k, v, leftpad, num_tokens, pages, format.head_dim);
  const int batch = tokens.k_array().extent(0);
  const Array table(block_table, "block_table", Access::read);
  table.expect_int32().expect_shape("(batch, max_pages)", {batch, kAny});
  table.expect_contiguous().expect_on(pages);
  const std::optional<Array> first = optional_ints(first_page, "first_page", batch, pages);
  const std::optional<Array> mean = optional_mean(k_mean, pages, format.head_dim);
  const PackProblem problem{.format = format,
                            .keep_first = keep_first,
                            .num_kv_heads = heads,
                            .k = tokens.k(),
                            .v = tokens.v(),
                            .runs = tokens.runs(),
                            .pool = pages.writable<std::uint8_t>(),
                            .num_pages = pages.extent(0),
                            .block_table = static_cast<const std::int32_t*>(table.data()),
                            .max_pages = table.extent(1),
                            .first_page = data_or_null(first),
                            .k_mean = mean_or_null(mean)};
  if (pages.device().is_cuda) {
    CudaExecution execution = cuda_execution(pages, options, k);
    std::optional<Array> word;
    if (!error_word.is_none()) {
      word = import_error_word(error_word, pages, Lifetime::call);
      execution.error_word = word->writable<int>();
    }
    run([&] {
      return options.checks_only ? validate_for_cuda(problem)
                                 : bitdecoding::pack_pages(problem, execution);
    });
  } else {
    if (!error_word.is_none()) {
      refuse_value("error_word = an array; allowed: None, since the arrays are on cpu");
    }
    const CpuExecution execution = cpu_execution(pages, options);
    run([&] {
      return options.checks_only ? validate(problem) : bitdecoding::pack_pages(problem, execution);
    });
  }
}

}  // namespace bitdecoding::python
