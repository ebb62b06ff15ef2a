// SPDX-License-Identifier: Apache-2.0
// Writes the error word of a launch: the first report is kept.
#pragma once

#include <cuda_runtime.h>

#include "bitdecoding/cache/device_error.hpp"

namespace bitdecoding {

__device__ inline void report(int* error_word, int sequence, int value, int limit,
                              DeviceError error) {
  if (error_word == nullptr || atomicCAS(error_word, 0, sequence + 1) != 0) return;
  error_word[1] = value;
  error_word[2] = limit;
  error_word[3] = static_cast<int>(error);
}
__device__ inline void report(int* error_word, int sequence, const Fault& fault) {
  report(error_word, sequence, fault.value, fault.limit, fault.error);
}

}  // namespace bitdecoding
