// SPDX-License-Identifier: Apache-2.0
// The CUDA entry points of a build without a CUDA compiler: each says so.
#include "bitdecoding/build_info.hpp"
#include "bitdecoding/run.hpp"

namespace bitdecoding {

std::string cuda_driver_version() { return ""; }

namespace {

Status without_kernels(const char* operation) {
  return Status(StatusCode::unsupported, std::string(operation) +
                                             " on a CUDA device: this build has no CUDA kernels "
                                             "(BITDECODING_CUDA = off)");
}

}  // namespace

Status pack_pages(const PackProblem&, const CudaExecution&) {
  return without_kernels("pack_pages");
}
Status append_tokens(const AppendProblem&, int*, const CudaExecution&) {
  return without_kernels("append_tokens");
}
Status choose_decode_kernel(const KvFormat&, int, int, const char**) {
  return without_kernels("choose_decode_kernel");
}
Status plan_decode(const KvFormat&, int, const char*, const CudaExecution&, decode::DecodePlan*) {
  return without_kernels("plan_decode");
}
Status decode_attention(const DecodeProblem&, const decode::DecodePlan&, void*,
                        const CudaExecution&) {
  return without_kernels("decode_attention");
}

}  // namespace bitdecoding
