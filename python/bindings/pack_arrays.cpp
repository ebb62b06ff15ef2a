// SPDX-License-Identifier: Apache-2.0
// Checks the arrays of a prefill pack and hands it to the back end of their device.
#include "pack_arrays.hpp"

#include "arrays.hpp"
#include "bitdecoding/layout/page_record.hpp"
#include "bitdecoding/quantize/pack_problem.hpp"
#include "bitdecoding/run.hpp"

namespace bitdecoding::python {

namespace {

inline constexpr int kErrorWord_ints = 4;  // see CudaExecution

CudaExecution cuda_execution(const Array& pool, std::optional<std::uintptr_t> stream,
                             const std::optional<Array>& error_word) {
  const std::string where = device_name(pool.device());
  if (!stream) {
    refuse_value("stream = None; allowed: a cudaStream_t as an int, since the arrays on ", where,
                 " are not torch tensors");
  }
  return {.device = pool.device().index,
          .stream = reinterpret_cast<void*>(*stream),
          .error_word = error_word ? error_word->writable<int>() : nullptr};
}

}  // namespace

void pack_arrays(nb::handle k, nb::handle v, nb::handle pool, nb::handle block_table,
                 const KvFormat& format, int keep_first, nb::handle first_page, nb::handle leftpad,
                 nb::handle num_tokens, int threads, std::optional<std::uintptr_t> stream,
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
                            .first_page = data_or_null(first)};
  const CpuExecution on_cpu{.threads = threads};
  Status status;
  if (pages.device().is_cuda) {
    std::optional<Array> word;
    if (!error_word.is_none()) {
      word.emplace(error_word, "error_word", Access::write);
      word->expect_int32().expect_shape("(4,)", {kErrorWord_ints}).expect_on(pages);
    }
    const CudaExecution on_cuda = cuda_execution(pages, stream, word);
    nb::gil_scoped_release release;
    status = bitdecoding::pack_pages(problem, on_cuda);
  } else {
    if (stream) refuse_value("stream = ", *stream, "; allowed: None, since the arrays are on cpu");
    nb::gil_scoped_release release;
    status = bitdecoding::pack_pages(problem, on_cpu);
  }
  throw_if_error(status);
}

}  // namespace bitdecoding::python
