// SPDX-License-Identifier: Apache-2.0
// Times by the method of README.md: replays of a CUDA graph between events.
#pragma once

#include "device_memory.hpp"

namespace bitdecoding::bench {

inline constexpr int kReplays = 100;
inline constexpr int kWarmUp = 3;

// Microseconds of each replay of a graph of what `enqueue` enqueues, which has run once before.
template <class Enqueue>
std::vector<double> time_graph(const Enqueue& enqueue, int replays = kReplays) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  enqueue(stream);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  for (int i = 0; i < kWarmUp; ++i) check(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
  std::vector<cudaEvent_t> events(2 * replays);
  for (auto& event : events) check(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < replays; ++i) {
    check(cudaEventRecord(events[2 * i], stream), "cudaEventRecord");
    check(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
    check(cudaEventRecord(events[2 * i + 1], stream), "cudaEventRecord");
  }
  check(cudaStreamSynchronize(stream), "replays");
  std::vector<double> times;
  for (int i = 0; i < replays; ++i) {
    float milliseconds = 0.f;
    check(cudaEventElapsedTime(&milliseconds, events[2 * i], events[2 * i + 1]), "events");
    times.push_back(1e3 * milliseconds);
  }
  for (const auto event : events) (void)cudaEventDestroy(event);
  (void)cudaGraphExecDestroy(replay);
  (void)cudaGraphDestroy(graph);
  (void)cudaStreamDestroy(stream);
  return times;
}

}  // namespace bitdecoding::bench
