// SPDX-License-Identifier: Apache-2.0
#include "execution.hpp"

namespace bitdecoding::python {

CpuExecution cpu_execution(const Array& pool, const RunOptions& options) {
  constexpr char kAllowed[] = "; allowed: None, since the arrays are on ";
  if (options.stream) {
    refuse_value("stream = ", *options.stream, kAllowed, device_name(pool.device()));
  }
  if (options.kernel) {
    refuse_value("kernel = '", *options.kernel, "'", kAllowed, device_name(pool.device()));
  }
  return {.threads = options.threads};
}

CudaExecution cuda_execution(const Array& pool, const RunOptions& options, nb::handle tensor) {
  if (options.threads != 0) {
    refuse_value("threads = ", options.threads, "; allowed: 0, since the arrays are on ",
                 device_name(pool.device()));
  }
  const int device = pool.device().index;
  if (options.checks_only) return {.device = device};
  const auto stream = options.stream ? options.stream : current_stream(tensor, device);
  if (!stream) {
    refuse_value("stream = None; allowed: a cudaStream_t as an int, since the arrays on ",
                 device_name(pool.device()), " are not torch tensors");
  }
  return {.device = device, .stream = reinterpret_cast<void*>(*stream)};
}

Array import_error_word(nb::handle object, const Array& pool, Lifetime lifetime) {
  Array word(object, "error_word", Access::write, lifetime);
  word.expect_int32().expect_shape("(4,)", {kErrorWord_ints}).expect_on(pool);
  return word;
}

}  // namespace bitdecoding::python
