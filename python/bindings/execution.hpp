// SPDX-License-Identifier: Apache-2.0
// How a call runs: on CPU threads or on a CUDA stream, while other Python threads run.
// What doesn't apply to the device of the arrays is refused, never ignored.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <string>

#include "arrays.hpp"
#include "bitdecoding/run.hpp"

namespace bitdecoding::python {

struct RunOptions {
  int threads = 0;                         // on a CPU; 0: one per hardware thread
  std::optional<std::uintptr_t> stream;    // on CUDA: a cudaStream_t; none: the library's current
  std::optional<std::string> kernel = {};  // on CUDA: a row of the kernel table, for decode
  bool checks_only = false;                // nothing runs: the arrays have no memory (traced_array)
};

// `pool`: one of the call's arrays, which are all on its device.
CpuExecution cpu_execution(const Array& pool, const RunOptions& options);
// Without an error word. `tensor`: an argument whose library says what the current stream is.
CudaExecution cuda_execution(const Array& pool, const RunOptions& options, nb::handle tensor);

// int32 (4,) beside `pool`.
Array import_error_word(nb::handle object, const Array& pool, Lifetime lifetime);

// Runs the library's work without the interpreter lock.
template <class Work>
void run(const Work& work) {
  Status status;
  {
    nb::gil_scoped_release release;
    status = work();
  }
  throw_if_error(status);
}

}  // namespace bitdecoding::python
