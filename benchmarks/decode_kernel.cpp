// SPDX-License-Identifier: Apache-2.0
// Times one decode kernel of the library by the method of README.md: replays of a CUDA graph whose
// launches take turns through caches in cold memory. Prints a JSON line per case.
//   decode_kernel KERNEL CASE... [FIRST/NEWEST] [FORMAT]
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>

#include "bitdecoding/build_info.hpp"
#include "bitdecoding/format/float16.hpp"
#include "bitdecoding/run.hpp"
#include "decode_case.hpp"

namespace bitdecoding::bench {
namespace {

constexpr int kTemplatePages = 16;  // pages that are packed; the pool repeats them
constexpr int kReplays = 100;
constexpr int kWarmUp = 3;

void check(const Status& status) {
  if (!status.is_ok()) throw std::runtime_error(status.text());
}

void check(cudaError_t error, const char* operation) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(error));
  }
}

class DeviceMemory {
 public:
  // Zeros.
  explicit DeviceMemory(std::size_t bytes) : bytes_(std::max<std::size_t>(bytes, 16)) {
    check(cudaMalloc(&data_, bytes_), "cudaMalloc");
    check(cudaMemset(data_, 0, bytes_), "cudaMemset");
  }
  // `bytes` that repeat `pattern`.
  template <class T>
  DeviceMemory(std::span<const T> pattern, std::size_t bytes) : DeviceMemory(bytes) {
    std::size_t done = std::min(bytes, pattern.size_bytes());
    check(cudaMemcpy(data_, pattern.data(), done, cudaMemcpyHostToDevice), "cudaMemcpy");
    while (done < bytes) {
      const std::size_t next = std::min(done, bytes - done);
      check(cudaMemcpy(at<char>(done), data_, next, cudaMemcpyDeviceToDevice), "cudaMemcpy");
      done += next;
    }
  }
  template <class T>
  explicit DeviceMemory(const std::vector<T>& values)
      : DeviceMemory(std::span<const T>(values), values.size() * sizeof(T)) {}
  ~DeviceMemory() { (void)cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::size_t bytes() const { return bytes_; }
  void* data() const { return data_; }
  template <class T>
  T* at(std::size_t index) const {
    return static_cast<T*>(data_) + index;
  }

 private:
  std::size_t bytes_;
  void* data_ = nullptr;
};

std::vector<std::uint16_t> random_fp16(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> values(count);
  for (auto& value : values) value = format::fp16_from_float(normal(random));
  return values;
}

std::vector<std::int32_t> shuffled(std::size_t count) {
  std::vector<std::int32_t> ids(count);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
  return ids;
}

// Pages [kTemplatePages, H, page_bytes] of real codes and parameters.
std::vector<std::uint8_t> packed_pages(const KvFormat& format, int heads) {
  const int tokens = kTemplatePages * format.page_tokens;
  const std::size_t row = static_cast<std::size_t>(heads) * format.head_dim;
  const auto k = random_fp16(tokens * row, 2), v = random_fp16(tokens * row, 3);  // (S, H, D)
  std::vector<std::uint8_t> memory(std::size_t{kTemplatePages} * heads * page_bytes(format) + 16);
  std::uint8_t* pool = memory.data() + (16 - reinterpret_cast<std::uintptr_t>(memory.data()) % 16);
  std::vector<std::int32_t> table(kTemplatePages);
  std::iota(table.begin(), table.end(), 0);
  PackProblem p;
  p.format = format;
  p.num_kv_heads = heads;
  p.k = {k.data(), ElementType::f16, 0, static_cast<std::int64_t>(row), format.head_dim};
  p.v = p.k;
  p.v.data = v.data();
  p.runs = {.batch = 1, .row_tokens = tokens};
  p.pool = pool;
  p.num_pages = p.max_pages = kTemplatePages;
  p.block_table = table.data();
  check(pack_pages(p, CpuExecution{}));
  return {pool, pool + memory.size() - 16};
}

PagedKvCache shape_of(const Case& c, const Request& r, int copies) {
  PagedKvCache cache{.format = r.format, .keep_first = r.keep_first, .keep_last = r.keep_last};
  cache.batch = c.batch;
  cache.num_kv_heads = c.heads_kv;
  cache.tail_tokens = min_tail_tokens(r.keep_last, r.format.page_tokens, 1);
  cache.max_pages =
      packed_tokens(c.length, r.keep_last, r.format.page_tokens, 0) / r.format.page_tokens;
  cache.num_pages = copies * c.batch * cache.max_pages;
  cache.num_slots = copies * c.batch;
  return cache;
}

// Caches of the same shape in different memory. Every sequence has pages and a slot of its own, in
// random order, in one pool and one side buffer. Queries and outputs are the same for all.
class ColdCaches {
 public:
  ColdCaches(const Case& c, const Request& r, int copies)
      : shape_(shape_of(c, r, copies)),
        pool_(std::span<const std::uint8_t>(packed_pages(r.format, c.heads_kv)),
              shape_.page_offset(shape_.num_pages, 0)),
        side_(std::span<const std::uint16_t>(random_fp16(1 << 20, 4)),
              2 * shape_.side_offset(shape_.num_slots, 0, 0)),
        block_table_(shuffled(static_cast<std::size_t>(shape_.num_pages))),
        slots_(shuffled(static_cast<std::size_t>(shape_.num_slots))),
        lengths_(std::vector<std::int32_t>(c.batch, c.length)),
        packed_(std::vector<std::int32_t>(c.batch, shape_.max_pages * r.format.page_tokens)),
        q_(random_fp16(query_bytes(c, r.format.head_dim) / 4, 5)),
        out_(q_.bytes()),
        query_heads_(c.heads_kv * c.group) {}

  DecodeProblem problem(int copy) const {
    DecodeProblem p{.cache = shape_, .query_heads = query_heads_};
    p.cache.pool = pool_.at<std::uint8_t>(0);
    p.cache.side = side_.at<std::uint16_t>(0);
    const std::size_t first = static_cast<std::size_t>(copy) * shape_.batch;  // sequence
    p.cache.block_table = block_table_.at<std::int32_t>(first * shape_.max_pages);
    p.cache.slots = slots_.at<std::int32_t>(first);
    p.cache.lengths = lengths_.at<std::int32_t>(0);
    p.cache.packed = packed_.at<std::int32_t>(0);
    const int head_dim = shape_.format.head_dim;
    p.softmax_scale = 1.f / std::sqrt(static_cast<float>(head_dim));
    p.q = q_.data();
    p.q_batch_stride = p.q_token_stride = std::int64_t{query_heads_} * head_dim;
    p.q_head_stride = head_dim;
    p.out = out_.data();
    return p;
  }

  void poison() { check(cudaMemset(out_.data(), 0xff, out_.bytes()), "cudaMemset"); }

  // Every output was written, and is finite.
  void verify() const {
    std::vector<std::uint16_t> out(out_.bytes() / 2);
    check(cudaMemcpy(out.data(), out_.data(), out_.bytes(), cudaMemcpyDeviceToHost), "decode");
    for (const std::uint16_t value : out) {
      if ((value & 0x7c00) == 0x7c00) throw std::runtime_error("the output is not finite");
    }
  }

 private:
  PagedKvCache shape_;
  DeviceMemory pool_, side_, block_table_, slots_, lengths_, packed_, q_, out_;
  int query_heads_;
};

// Microseconds of each replay of a graph of what `enqueue` enqueues, which has run once before.
template <class Enqueue>
std::vector<double> time_graph(const Enqueue& enqueue) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  enqueue(stream);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  for (int i = 0; i < kWarmUp; ++i) check(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
  std::vector<cudaEvent_t> events(2 * kReplays);
  for (auto& event : events) check(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < kReplays; ++i) {
    check(cudaEventRecord(events[2 * i], stream), "cudaEventRecord");
    check(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
    check(cudaEventRecord(events[2 * i + 1], stream), "cudaEventRecord");
  }
  check(cudaStreamSynchronize(stream), "decode");
  std::vector<double> times;
  for (int i = 0; i < kReplays; ++i) {
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

// The fields have the names of decode.py's rows.
void print_row(const Case& c, const Request& r, const std::vector<double>& times, int launches,
               const cudaDeviceProp& device) {
  const double median = quantile(times, 0.5) / launches;
  const std::int64_t moved = decode_bytes(c, r);
  const BuildInfo build = build_info();
  std::printf("{\"batch\": %d, \"heads_kv\": %d, \"group\": %d, \"length\": %d, ", c.batch,
              c.heads_kv, c.group, c.length);
  std::printf("\"format\": \"%s\", \"mode\": \"graph\", \"sinks\": %d, \"recent\": %d, ",
              name(r.format).c_str(), r.keep_first, r.keep_last);
  std::printf("\"time_us\": %.2f, \"p10_us\": %.2f, \"p90_us\": %.2f, ", median,
              quantile(times, 0.1) / launches, quantile(times, 0.9) / launches);
  std::printf("\"bytes\": %lld, \"tb_per_s\": %.3f, \"kernel\": \"%s\", ",
              static_cast<long long>(moved), static_cast<double>(moved) / median / 1e6,
              r.kernel.c_str());
  std::printf("\"gpu\": \"%s\", \"cuda_driver\": \"%s\", \"nvcc\": \"%s\", \"commit\": \"%s\", ",
              device.name, cuda_driver_version().c_str(), build.cuda.c_str(), build.git.c_str());
  std::printf("\"iterations\": %zu}\n", times.size());
  std::fflush(stdout);
}

void time_case(const Case& c, const Request& r, const cudaDeviceProp& device) {
  const int copies = copies_needed(decode_bytes(c, r), device.l2CacheSize);
  const int launches = launches_needed(copies);
  ColdCaches caches(c, r, copies);
  const DeviceMemory error_word(sizeof(int) * kErrorWord_ints);
  CudaExecution execution{.error_word = error_word.at<int>(0)};
  decode::DecodePlan plan;
  check(plan_decode(r.format, c.group, r.kernel.c_str(), execution, &plan));
  const DeviceMemory workspace(plan.workspace_bytes);
  const auto enqueue = [&](cudaStream_t stream) {
    execution.stream = stream;
    for (int i = 0; i < launches; ++i) {
      check(decode_attention(caches.problem(i % copies), plan, workspace.data(), execution));
    }
  };
  enqueue(nullptr);  // the first call of a kernel loads it, which no capture may do
  check(cudaDeviceSynchronize(), "decode");
  caches.poison();
  const std::vector<double> times = time_graph(enqueue);
  caches.verify();
  int fault[kErrorWord_ints];
  check(cudaMemcpy(fault, error_word.at<int>(0), sizeof fault, cudaMemcpyDeviceToHost), "decode");
  if (fault[0] != 0) throw std::runtime_error("decode reported a fault of its cache");
  print_row(c, r, times, launches, device);
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
