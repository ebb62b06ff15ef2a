// SPDX-License-Identifier: Apache-2.0
// Where a decode kernel's time goes: times it and what is left of it when parts of its arithmetic
// are taken out, like decode_kernel. Prints a JSON line per case, format, kernel and stage.
//   stages CASE... [FIRST/NEWEST] [FORMAT...]
#include "decode_timing.hpp"
#include "stage_row.hpp"

namespace bitdecoding::bench {
namespace {

void time_stages(const Case& c, Request r, const StageRow& row, DecodeTimer& timer,
                 const cudaDeviceProp& device) {
  r.kernel = row.kernel;
  CudaExecution execution{.error_word = timer.error_word()};
  decode::DecodePlan plan;
  check(plan_decode(r.format, c.group, row.kernel, execution, &plan));
  const DeviceMemory workspace(plan.workspace_bytes);
  for (const Stage& stage : row.stages) {
    const auto times = timer.time([&](const DecodeProblem& problem, cudaStream_t stream) {
      check(stage.launch(problem, plan, workspace.at<std::uint8_t>(0), stream, timer.error_word()),
            stage.name);
    });
    print_row(c, r, stage.name, times, device);
  }
  const auto times = timer.time([&](const DecodeProblem& problem, cudaStream_t stream) {
    execution.stream = stream;
    check(decode_attention(problem, plan, workspace.data(), execution));
  });
  print_row(c, r, "full", times, device);
}

// By every kernel of the format whose tile holds the group's columns. Returns how many there were.
int time_case(const Case& c, const Request& r, const cudaDeviceProp& device) {
  DecodeTimer timer(c, r, device);
  int kernels = 0;
  for (const StageRow& row : stage_rows()) {
    if (!(row.config.page == layout::page_config(r.format))) continue;
    if (row.config.query_columns < c.group) continue;
    time_stages(c, r, row, timer, device);
    ++kernels;
  }
  return kernels;
}

}  // namespace
}  // namespace bitdecoding::bench

int main(int argc, char** argv) {
  using namespace bitdecoding::bench;
  std::vector<Request> requests;
  if (const auto status = parse_stage_requests({argv + 1, argv + argc}, &requests);
      !status.is_ok()) {
    std::fprintf(stderr, "%s\nusage: stages CASE... [FIRST/NEWEST] [FORMAT...]\n",
                 status.text().c_str());
    return 2;
  }
  try {
    int kernels = 0;
    cudaDeviceProp device{};
    check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
    for (const Request& request : requests) {
      for (const Case& one : request.cases) kernels += time_case(one, request, device);
    }
    if (kernels == 0) throw std::runtime_error("no kernel of this build fits");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "stages: %s\n", error.what());
    return 1;
  }
  return 0;
}
