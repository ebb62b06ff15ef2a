// SPDX-License-Identifier: Apache-2.0
#include "execution.hpp"

namespace bitdecoding::python {

CpuExecution cpu_execution(const Array& pool, const RunOptions& options) {
  const std::string where = device_name(pool.device());
  if (options.stream) {
    refuse_value("stream = ", *options.stream, "; allowed: None, since the arrays are on ", where);
  }
  if (options.kernel) {
    refuse_value("kernel = '", *options.kernel, "'; allowed: None, since the arrays are on ",
                 where);
  }
  return {.threads = options.threads};
}

CudaExecution cuda_execution(const Array& pool, const RunOptions& options) {
  const std::string where = device_name(pool.device());
  if (options.threads != 0) {
    refuse_value("threads = ", options.threads, "; allowed: 0, since the arrays are on ", where);
  }
  if (!options.stream) {
    refuse_value("stream = None; allowed: a cudaStream_t as an int, since the arrays on ", where,
                 " are not torch tensors");
  }
  return {.device = pool.device().index, .stream = reinterpret_cast<void*>(*options.stream)};
}

Array import_error_word(nb::handle object, const Array& pool) {
  Array word(object, "error_word", Access::write);
  word.expect_int32().expect_shape("(4,)", {kErrorWord_ints}).expect_on(pool);
  return word;
}

}  // namespace bitdecoding::python
