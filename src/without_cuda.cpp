// SPDX-License-Identifier: Apache-2.0
// The CUDA entry points of a build without a CUDA compiler: each says so.
#include "bitdecoding/build_info.hpp"
#include "bitdecoding/run.hpp"

namespace bitdecoding {

std::string cuda_driver_version() { return ""; }

Status pack_pages(const PackProblem&, const CudaExecution&) {
  return Status(StatusCode::unsupported,
                "pack_pages on a CUDA device: this build has no CUDA kernels "
                "(BITDECODING_CUDA = off)");
}

}  // namespace bitdecoding
