// SPDX-License-Identifier: Apache-2.0
// Enqueues a kernel on the current device. An error of the launch is what it returns; CUDA's last
// error, which may be somebody else's, is not looked at.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace bitdecoding {

// Kernels that take more than 48 KB of shared memory say so on each device, before a launch; 99 KB
// is what every device from 8.0 on has.
template <int Bytes, class Kernel>
cudaError_t allow_shared(Kernel* kernel) {
  static_assert(Bytes <= 99 * 1024, "more than a CTA has on 8.6 and 8.9");
  if constexpr (Bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Bytes);
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int smem_bytes,
                   cudaStream_t stream, const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(smem_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace bitdecoding
