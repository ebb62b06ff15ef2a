// SPDX-License-Identifier: Apache-2.0
// Times what decodes a case from caches in cold memory, and prints it like a row of decode.py.
#pragma once

#include "bitdecoding/build_info.hpp"
#include "cold_caches.hpp"
#include "graph_timing.hpp"
#include "quantile.hpp"

namespace bitdecoding::bench {

class DecodeTimer {
 public:
  DecodeTimer(const Case& c, const Request& r, const cudaDeviceProp& device)
      : copies_(copies_needed(decode_bytes(c, r), device.l2CacheSize)),
        caches_(c, r, copies_),
        error_word_(sizeof(int) * kErrorWord_ints) {}

  int* error_word() const { return error_word_.at<int>(0); }

  // Microseconds of a call in each replay. `decode(problem, stream)` enqueues one.
  template <class Decode>
  std::vector<double> time(const Decode& decode) {
    const int launches = launches_needed(copies_);
    const auto enqueue = [&](cudaStream_t stream) {
      for (int i = 0; i < launches; ++i) decode(caches_.problem(i % copies_), stream);
    };
    enqueue(nullptr);  // the first call of a kernel loads it, which no capture may do
    check(cudaDeviceSynchronize(), "decode");
    caches_.poison();
    std::vector<double> times = time_graph(enqueue);
    caches_.verify();
    int fault[kErrorWord_ints];
    check(cudaMemcpy(fault, error_word(), sizeof fault, cudaMemcpyDeviceToHost), "decode");
    if (fault[0] != 0) throw std::runtime_error("decode reported a fault of its cache");
    for (double& microseconds : times) microseconds /= launches;
    return times;
  }

 private:
  int copies_;
  ColdCaches caches_;
  DeviceMemory error_word_;
};

// The fields have the names of decode.py's rows; `stage`: "full", or what is left of the kernel.
inline void print_row(const Case& c, const Request& r, const char* stage,
                      const std::vector<double>& times, const cudaDeviceProp& device) {
  const double median = quantile(times, 0.5);
  const std::int64_t moved = decode_bytes(c, r);
  const BuildInfo build = build_info();
  std::printf("{\"batch\": %d, \"heads_kv\": %d, \"group\": %d, \"length\": %d, ", c.batch,
              c.heads_kv, c.group, c.length);
  std::printf("\"format\": \"%s\", \"mode\": \"graph\", \"sinks\": %d, \"recent\": %d, ",
              name(r.format).c_str(), r.keep_first, r.keep_last);
  std::printf("\"time_us\": %.2f, \"p10_us\": %.2f, \"p90_us\": %.2f, ", median,
              quantile(times, 0.1), quantile(times, 0.9));
  std::printf("\"bytes\": %lld, \"tb_per_s\": %.3f, \"kernel\": \"%s\", \"stage\": \"%s\", ",
              static_cast<long long>(moved), static_cast<double>(moved) / median / 1e6,
              r.kernel.c_str(), stage);
  std::printf("\"gpu\": \"%s\", \"cuda_driver\": \"%s\", \"nvcc\": \"%s\", \"commit\": \"%s\", ",
              device.name, cuda_driver_version().c_str(), build.cuda.c_str(), build.git.c_str());
  std::printf("\"iterations\": %zu}\n", times.size());
  std::fflush(stdout);
}

}  // namespace bitdecoding::bench
