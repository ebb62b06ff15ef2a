// SPDX-License-Identifier: Apache-2.0
// How fast this GPU reads: bulk copies into shared memory by every SM, and nothing else. The best
// of a few sizes and numbers of copies; the last line is JSON with bytes, time_us, p10_us, p90_us
// and iterations, what decode.py --read-command asks for.
#include <cstdio>

#include "bitdecoding/decode/load_bulk.cuh"
#include "graph_timing.hpp"
#include "quantile.hpp"

namespace bitdecoding::bench {
namespace {

constexpr int kReadWarps = 8, kReadStages = 8;              // at most
constexpr std::int64_t kReadBytes = std::int64_t{1} << 32;  // of a launch
constexpr int kBuffers = 2;                                 // launches take turns
constexpr int kLaunches = 10;                               // of a graph
constexpr int kFewReplays = 10;                             // to choose by

struct ReadSetting {
  int copy_bytes;
  int warps;   // of a CTA, one CTA per SM
  int stages;  // of a warp's ring: copies under way

  int in_flight_bytes() const { return copy_bytes * warps * stages; }
};

constexpr ReadSetting kSettings[] = {
    {8192, 4, 2},  {8192, 8, 1},  {8192, 4, 3},  {8192, 4, 4},  {8192, 8, 2},
    {16384, 4, 1}, {16384, 2, 2}, {16384, 2, 3}, {16384, 4, 2}, {16384, 4, 3},
};

// The word of a copy that a lane reads; lanes meet different banks.
__host__ __device__ constexpr int token_word(int copy_bytes, int lane) {
  return lane * (copy_bytes / 128 + 1);
}

// Words are their own index.
__global__ void write_words(std::uint32_t* words, std::int64_t count) {
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += threads) {
    words[i] = static_cast<std::uint32_t>(i);
  }
}

using Warp = decode::StreamThreads<decode::DecodeConfig{decode::Arch::sm90}>;

// Warps take copies in turns, so that the SMs read neighbouring memory at the same time. A stage is
// loaded anew once every lane has added a word of it to its sum.
__global__ void __launch_bounds__(kReadWarps * 32, 1)
    read_bulk(const std::uint8_t* data, std::int64_t copies, ReadSetting setting,
              std::uint32_t* sums) {
  extern __shared__ __align__(128) std::uint8_t smem[];
  __shared__ std::uint64_t barriers[kReadWarps][kReadStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int bytes = setting.copy_bytes, stages = setting.stages;
  std::uint8_t* ring = smem + warp * stages * bytes;
  decode::BulkLoader<Warp> loader(barriers[warp], stages, lane);
  const std::int64_t first = blockIdx.x * setting.warps + warp, step = gridDim.x * setting.warps;
  const auto load = [&](std::int64_t copy, int stage) {
    if (copy >= copies) return;
    loader.load_packed(stage, data + copy * bytes, ring + stage * bytes, bytes, nullptr, nullptr,
                       0);
  };
  for (int stage = 0; stage < stages; ++stage) load(first + stage * step, stage);
  std::uint32_t sum = 0;
  int stage = 0, phase = 0;
  for (std::int64_t copy = first; copy < copies; copy += step) {
    loader.wait(stage, phase, stages, false);
    sum += reinterpret_cast<const std::uint32_t*>(ring + stage * bytes)[token_word(bytes, lane)];
    __syncwarp();
    load(copy + stages * step, stage);
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// What the sums of a launch over the first buffer add up to.
std::uint32_t expected_sum(int copy_bytes) {
  std::uint32_t sum = 0;
  for (std::int64_t copy = 0; copy < kReadBytes / copy_bytes; ++copy) {
    for (int lane = 0; lane < 32; ++lane) {
      sum += static_cast<std::uint32_t>(copy * (copy_bytes / 4) + token_word(copy_bytes, lane));
    }
  }
  return sum;
}

class ReadBench {
 public:
  explicit ReadBench(int sms)
      : sms_(sms), data_(kBuffers * kReadBytes), sums_(sms * kReadWarps * 32 * sizeof(int)) {
    write_words<<<8 * sms, 256>>>(data_.at<std::uint32_t>(0), kBuffers * kReadBytes / 4);
    check(cudaGetLastError(), "write_words");
  }

  // Microseconds of a launch, which reads kReadBytes, in each replay.
  std::vector<double> time(const ReadSetting& setting, int replays) const {
    const int smem_bytes = setting.in_flight_bytes();
    check(cudaFuncSetAttribute(read_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
          "cudaFuncSetAttribute");
    const auto read = [&](int buffer, cudaStream_t stream) {
      read_bulk<<<sms_, setting.warps * 32, smem_bytes, stream>>>(
          data_.at<std::uint8_t>(buffer * kReadBytes), kReadBytes / setting.copy_bytes, setting,
          sums_.at<std::uint32_t>(0));
      check(cudaGetLastError(), "read_bulk");
    };
    read(0, nullptr);
    verify(setting);
    const auto enqueue = [&](cudaStream_t stream) {
      for (int i = 0; i < kLaunches; ++i) read(i % kBuffers, stream);
    };
    std::vector<double> times = time_graph(enqueue, replays);
    for (double& microseconds : times) microseconds /= kLaunches;
    return times;
  }

 private:
  // Every copy was read, from its place.
  void verify(const ReadSetting& setting) const {
    std::vector<std::uint32_t> sums(sms_ * setting.warps * 32);
    check(cudaMemcpy(sums.data(), sums_.data(), 4 * sums.size(), cudaMemcpyDeviceToHost),
          "read_bulk");
    std::uint32_t sum = 0;
    for (const std::uint32_t one : sums) sum += one;
    if (sum != expected_sum(setting.copy_bytes)) throw std::runtime_error("a copy is missing");
  }

  int sms_;
  DeviceMemory data_, sums_;
};

void print_row(const ReadSetting& setting, const std::vector<double>& times) {
  const double median = quantile(times, 0.5);
  std::printf("{\"bytes\": %lld, \"time_us\": %.2f, \"p10_us\": %.2f, \"p90_us\": %.2f, ",
              static_cast<long long>(kReadBytes), median, quantile(times, 0.1),
              quantile(times, 0.9));
  std::printf("\"tb_per_s\": %.3f, \"copy_bytes\": %d, \"warps\": %d, \"stages\": %d, ",
              static_cast<double>(kReadBytes) / median / 1e6, setting.copy_bytes, setting.warps,
              setting.stages);
  std::printf("\"iterations\": %zu}\n", times.size());
  std::fflush(stdout);
}

// A line for every setting, then one for the best of them, with more replays.
void time_reads() {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  const ReadBench bench(device.multiProcessorCount);
  ReadSetting best{};
  double least = 0.;
  for (const ReadSetting& setting : kSettings) {
    const std::vector<double> times = bench.time(setting, kFewReplays);
    print_row(setting, times);
    const double median = quantile(times, 0.5);
    if (best.warps != 0 && median >= least) continue;
    best = setting;
    least = median;
  }
  print_row(best, bench.time(best, kReplays));
}

}  // namespace
}  // namespace bitdecoding::bench

int main() {
  try {
    bitdecoding::bench::time_reads();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "read_rate: %s\n", error.what());
    return 1;
  }
  return 0;
}
