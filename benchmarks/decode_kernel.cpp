// SPDX-License-Identifier: Apache-2.0
// Times one decode kernel of the library by the method of README.md: replays of a CUDA graph whose
// launches take turns through caches in cold memory. Prints a JSON line per case.
//   decode_kernel KERNEL CASE... [FIRST/NEWEST] [FORMAT]
#include "decode_timing.hpp"

namespace bitdecoding::bench {
namespace {

void time_case(const Case& c, const Request& r, const cudaDeviceProp& device) {
  DecodeTimer timer(c, r, device);
  CudaExecution execution{.error_word = timer.error_word()};
  decode::DecodePlan plan;
  check(plan_decode(r.format, c.group, r.kernel.c_str(), execution, &plan));
  const DeviceMemory workspace(plan.workspace_bytes);
  const auto times = timer.time([&](const DecodeProblem& problem, cudaStream_t stream) {
    execution.stream = stream;
    check(decode_attention(problem, plan, workspace.data(), execution));
  });
  print_row(c, r, "full", times, device);
}

}  // namespace
}  // namespace bitdecoding::bench

int main(int argc, char** argv) {
  using namespace bitdecoding::bench;
  Request request;
  if (const auto status = parse_request({argv + 1, argv + argc}, &request); !status.is_ok()) {
    std::fprintf(stderr, "%s\nusage: decode_kernel KERNEL CASE... [FIRST/NEWEST] [FORMAT]\n",
                 status.text().c_str());
    return 2;
  }
  try {
    cudaDeviceProp device{};
    check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
    for (const Case& one : request.cases) time_case(one, request, device);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "decode_kernel: %s\n", error.what());
    return 1;
  }
  return 0;
}
