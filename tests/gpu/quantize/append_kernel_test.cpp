// SPDX-License-Identifier: Apache-2.0
// The CUDA append leaves the bytes of the CPU append, used or not: every legal format, zones, fp16
// and bf16, any number of tokens at a time, ragged and padded rows, eager and as a replayed graph.
// Of a sequence with a fault nothing is written, it is reported, and its neighbours are right.
#include "bitdecoding/quantize/append_problem.hpp"

#include <doctest.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "bitdecoding/format/float16.hpp"
#include "bitdecoding/run.hpp"
#include "built_formats.hpp"
#include "device_cache.hpp"

namespace bitdecoding::test {
namespace {

constexpr int kBatch = 3;
constexpr int kHeads = 2;
constexpr int kRowTokens = 1100;  // S of the arrays; a call may use fewer

// 16-bit patterns of (B, S, H, D): normal numbers, and now and then any bits at all.
struct Tokens {
  Tokens(ElementType type, int batch, int tokens, int heads, int head_dim, unsigned seed)
      : rows{nullptr, type, std::int64_t{tokens} * heads * head_dim, std::int64_t{heads} * head_dim,
             head_dim},
        values(static_cast<std::size_t>(rows.batch_stride * batch)) {
    std::mt19937 random(seed);
    NormalSource normal(seed);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const float value = i % 17 == 3 ? 40.f * normal() + 5.f : normal();
      values[i] = type == ElementType::f16 ? format::fp16_from_float(value)
                                           : format::bf16_from_float(value);
      if (random() % 5000 == 0) values[i] = static_cast<std::uint16_t>(random());
    }
  }
  // From `row` of every sequence on.
  TokenRows at(const std::uint16_t* data, int row = 0) const {
    TokenRows view = rows;
    view.data = data + row * rows.token_stride;
    return view;
  }

  TokenRows rows;  // without data
  std::vector<std::uint16_t> values;
};

// One call's tokens: the same for both back ends.
struct Step {
  int row_tokens;  // S
  int row;         // of the arrays, at which every sequence's S rows begin
  std::vector<std::int32_t> leftpad, num_tokens;  // empty: not given
  int max_tokens = INT_MAX;
};

Step draw_step(int tokens, std::mt19937& random) {
  const int row = static_cast<int>(random() % static_cast<unsigned>(kRowTokens - tokens + 1));
  Step step{tokens, row, {}, {}};
  const auto below = [&](int end) { return static_cast<int>(random() % unsigned(end + 1)); };
  if (random() % 2 == 0) return step;
  for (int b = 0; b < kBatch; ++b) {
    const int count = b == tokens % kBatch ? tokens : below(tokens);
    step.num_tokens.push_back(count);
    step.leftpad.push_back(below(tokens - count));
  }
  if (random() % 4 == 0) step.num_tokens.clear();
  return step;
}

AppendProblem problem_of(const PagedKvCache& cache, const TokenRows& k, const TokenRows& v,
                         const Step& step, const std::int32_t* leftpad,
                         const std::int32_t* num_tokens) {
  return {cache,
          k,
          v,
          {cache.batch, step.row_tokens, step.leftpad.empty() ? nullptr : leftpad,
           step.num_tokens.empty() ? nullptr : num_tokens},
          step.max_tokens};
}

void append_on_cpu(CacheBox& box, const Tokens& k, const Tokens& v, const Step& step) {
  const AppendProblem problem =
      problem_of(box.view(), k.at(k.values.data(), step.row), v.at(v.values.data(), step.row), step,
                 step.leftpad.data(), step.num_tokens.data());
  const Status status = append_tokens(problem, CpuExecution{});
  REQUIRE_MESSAGE(status.is_ok(), status.text());
}

// Keys and values on the device, and what every call needs there.
class Device {
 public:
  Device(const Tokens& k, const Tokens& v)
      : k_(k), v_(v), k_values_(k.values), v_values_(v.values) {}

  void append(const DeviceCache& cache, const Step& step) const {
    const DeviceArray leftpad(step.leftpad), num_tokens(step.num_tokens);
    enqueue(cache, step, leftpad.data(), num_tokens.data(), nullptr);
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);  // the arrays end here
  }
  void enqueue(const DeviceCache& cache, const Step& step, const std::int32_t* leftpad,
               const std::int32_t* num_tokens, cudaStream_t stream) const {
    const AppendProblem problem =
        problem_of(cache.view(), k_.at(k_values_.data(), step.row),
                   v_.at(v_values_.data(), step.row), step, leftpad, num_tokens);
    const Status status =
        append_tokens(problem, counters_.data(),
                      CudaExecution{.stream = stream, .error_word = error_word_.data()});
    REQUIRE_MESSAGE(status.is_ok(), status.text());
  }

  std::vector<int> error_word() const { return error_word_.host(); }
  bool counters_are_zero() const { return counters_.host() == std::vector<int>(kMostSequences, 0); }

  static constexpr int kMostSequences = 300;

 private:
  const Tokens& k_;
  const Tokens& v_;
  DeviceArray<std::uint16_t> k_values_, v_values_;
  DeviceArray<int> counters_{std::vector<int>(kMostSequences, 0)};
  DeviceArray<int> error_word_{std::vector<int>(kErrorWord_ints, 0)};
};

struct Inputs {
  Inputs(ElementType type, int head_dim)
      : k(type, kBatch, kRowTokens, kHeads, head_dim, 1),
        v(type, kBatch, kRowTokens, kHeads, head_dim, 2),
        device(k, v) {}

  Tokens k, v;
  Device device;
};

// Where two caches first differ; empty if nowhere.
std::string difference(const CacheBox& cpu, const CacheBox& device) {
  const auto first = [](const std::vector<Piece>& a, const std::vector<Piece>& b) {
    return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin()).first -
                                    a.begin()) *
           sizeof(Piece);
  };
  const auto page = static_cast<std::size_t>(page_bytes(cpu.cache.format));
  std::ostringstream text;
  if (cpu.pool != device.pool) {
    const std::size_t at = first(cpu.pool, device.pool);
    text << "pool: record " << at / page << ", byte " << at % page << "; ";
  }
  if (cpu.side != device.side) {
    text << "side: element " << first(cpu.side, device.side) / 2 << "; ";
  }
  if (cpu.lengths != device.lengths) text << "lengths; ";
  if (cpu.packed != device.packed) text << "packed; ";
  return text.str();
}

void check_steps(CacheBox& box, const Inputs& inputs, const std::vector<int>& tokens,
                 std::mt19937& random) {
  const DeviceCache device(box);
  int done = 0;
  for (const int count : tokens) {
    const Step step = draw_step(count, random);
    append_on_cpu(box, inputs.k, inputs.v, step);
    inputs.device.append(device, step);
    const std::string where = difference(box, device.host());
    CHECK_MESSAGE(where.empty(), where, "in step ", done, " of ", count, " tokens");
    if (!where.empty()) return;
    ++done;
  }
  CHECK(inputs.device.counters_are_zero());
  CHECK(inputs.device.error_word()[0] == 0);
}

struct Zones {
  int first, last;
};
constexpr Zones kZones[] = {{0, 0}, {16, 64}, {5, 30}, {50, 200}};

}  // namespace

TEST_CASE("bytes equal the CPU's for every legal format that has kernels, in steps of any size") {
  unsigned seed = std::random_device{}();
  MESSAGE("first seed ", seed);
  const Inputs inputs[2][3] = {
      {{ElementType::f16, 64}, {ElementType::f16, 128}, {ElementType::f16, 256}},
      {{ElementType::bf16, 64}, {ElementType::bf16, 128}, {ElementType::bf16, 256}}};
  std::vector<int> steps = {1, 2, 17, 64, 128, 129, 1000, 1, 300};
  for (const KvFormat& f : built_formats()) {
    std::mt19937 random(++seed);
    std::shuffle(steps.begin(), steps.end(), random);
    const Zones zones = kZones[random() % 4];
    const int max_append = random() % 2 == 0 ? 1 : static_cast<int>(random() % 200) + 1;
    const bool has_mean = seed % 5 == 0;
    CacheBox box(f, {kBatch, kHeads, 1800, zones.first, zones.last, max_append, has_mean}, seed);
    INFO(name(f), " seed ", seed, " zones ", zones.first, "/", zones.last, " tail rows ",
         box.cache.tail_tokens);
    check_steps(box, inputs[random() % 2][f.head_dim / 128], steps, random);
  }
}

TEST_CASE(
    "token by token over several pages, every zone, plain fp16 and bf16 that is transformed") {
  for (const ElementType type : {ElementType::f16, ElementType::bf16}) {
    const Inputs inputs(type, 128);
    for (const Zones& zones : kZones) {
      const int page_tokens = type == ElementType::f16 ? 128 : 64;
      const bool changes = type == ElementType::bf16;
      const KvFormat f{.v_bits = 2,
                       .k_group = 64,
                       .v_group = 64,
                       .page_tokens = page_tokens,
                       .k_rotation = changes ? 128 : 0,
                       .v_rotation = changes ? 64 : 0};
      CacheBox box(f, {kBatch, kHeads, 600, zones.first, zones.last, 1, changes});
      INFO("zones ", zones.first, "/", zones.last, " pages of ", page_tokens);
      std::mt19937 random(7);
      check_steps(box, inputs, std::vector<int>(420, 1), random);
    }
  }
}

TEST_CASE("a rollback within max_append, then other tokens") {
  const KvFormat f{.k_group = 32, .page_tokens = 64};
  const Inputs inputs(ElementType::f16, f.head_dim);
  CacheBox box(f, {kBatch, kHeads, 600, 16, 20, 8});
  std::mt19937 random(3);
  check_steps(box, inputs, {200, 7, 90}, random);
  for (int& length : box.lengths) length -= std::min(length, 7);
  check_steps(box, inputs, {1, 5, 64, 3}, random);
}

TEST_CASE("many sequences and heads, a prompt and steps") {
  const int batch = Device::kMostSequences, heads = 5;
  const KvFormat f{
      .k_bits = 2, .k_axis = KAxis::token, .k_group = 64, .v_group = 64, .head_dim = 64};
  const Tokens k(ElementType::f16, batch, 150, heads, f.head_dim, 5);
  const Tokens v(ElementType::bf16, batch, 150, heads, f.head_dim, 6);
  const Device device(k, v);
  CacheBox box(f, {batch, heads, 300, 16, 10});
  const DeviceCache cache(box);
  Step step{150, 0, {}, {}};
  for (int b = 0; b < batch; ++b) step.num_tokens.push_back(b % 151);
  for (int i = 0; i < 20; ++i) {
    append_on_cpu(box, k, v, step);
    device.append(cache, step);
    step = {1, i, {}, {}};
  }
  CHECK(difference(box, cache.host()) == "");
  CHECK(device.counters_are_zero());
  CHECK(device.error_word()[0] == 0);
}

namespace {

// Three sequences of 300, 420 and 250 tokens (keep_last 64, five pages of 128), and the next call.
struct Calls {
  explicit Calls(const Inputs& inputs) : box({.v_bits = 2}, {kBatch, kHeads, 512, 16, 64}) {
    append_on_cpu(box, inputs.k, inputs.v, {420, 0, {0, 0, 0}, {300, 420, 250}});
  }
  // 130 tokens each; to sequence 1 others.
  void take(int leftpad, int num_tokens) {
    step.leftpad[1] = leftpad;
    step.num_tokens[1] = num_tokens;
  }

  CacheBox box;
  Step step{500, 100, {370, 370, 370}, {130, 130, 130}};
};

struct FaultCase {
  Fault fault;
  std::function<void(Calls&)> spoil;  // sequence 1
};

std::vector<FaultCase> fault_cases(const PagedKvCache& c) {
  using enum DeviceError;
  const int pages = c.num_pages, slots = c.num_slots, tail = c.tail_tokens;
  return {
      {{run, -1, 500}, [](Calls& c) { c.take(-1, 130); }},
      {{run, 501, 500}, [](Calls& c) { c.take(501, 0); }},
      {{run, INT_MIN, 500}, [](Calls& c) { c.take(INT_MIN, 0), c.step.num_tokens.clear(); }},
      {{run, -2, 500}, [](Calls& c) { c.take(0, -2); }},
      {{run, 131, 500}, [](Calls& c) { c.take(370, 131); }},
      {{slot, slots, slots}, [slots](Calls& c) { c.box.slots[1] = slots; }},
      {{slot, -1, slots}, [](Calls& c) { c.box.slots[1] = -1; }},
      {{length, -5, tail}, [](Calls& c) { c.box.lengths[1] = -5; }},
      {{length, 744, tail}, [](Calls& c) { c.box.lengths[1] = 1000; }},
      {{packed, -128, 640}, [](Calls& c) { c.box.packed[1] = -128; }},
      {{packed, 100, 640}, [](Calls& c) { c.box.packed[1] = 100; }},
      {{packed, 512, 640}, [](Calls& c) { c.box.packed[1] = 512; }},
      {{packed, 768, 640}, [](Calls& c) { c.box.packed[1] = 768, c.box.lengths[1] = 800; }},
      {{grown_length, 550, 549}, [](Calls& c) { c.step.max_tokens = 549; }},
      {{grown_pages, 6, 5}, [](Calls& c) { c.take(0, 412); }},
      // A page whose tokens all lie in the ring, and one of new tokens alone.
      {{page_id, pages, pages}, [pages](Calls& c) { c.box.block_table[5 + 2] = pages; }},
      {{page_id, -1, pages}, [](Calls& c) { c.take(0, 300), c.box.block_table[5 + 4] = -1; }},
  };
}

}  // namespace

TEST_CASE("a sequence with a fault is reported and not written, the others are right") {
  const Inputs inputs(ElementType::bf16, 128);
  const Calls sound(inputs);
  CacheBox expected = sound.box;
  Step others = sound.step;
  others.num_tokens[1] = 0;
  append_on_cpu(expected, inputs.k, inputs.v, others);
  for (const FaultCase& bad : fault_cases(sound.box.cache)) {
    Calls calls = sound;
    bad.spoil(calls);
    expected.lengths[1] = calls.box.lengths[1];
    expected.packed[1] = calls.box.packed[1];
    const Device device(inputs.k, inputs.v);
    const DeviceCache cache(calls.box);
    device.append(cache, calls.step);
    const Fault& f = bad.fault;
    CHECK(device.error_word() == std::vector<int>{2, f.value, f.limit, static_cast<int>(f.error)});
    CHECK(difference(expected, cache.host()) == "");
    CHECK(device.counters_are_zero());
  }
}

TEST_CASE("a graph of one step, replayed over page boundaries, equals single calls") {
  constexpr int kSteps = 400;
  const KvFormat f{.k_group = 64, .v_group = 64};
  const Inputs inputs(ElementType::bf16, f.head_dim);
  CacheBox box(f, {kBatch, kHeads, 512, 16, 30});
  const DeviceCache cache(box);
  // Every replay finds the row of its token in `leftpad`.
  std::vector<std::int32_t> rows;
  for (int i = 0; i < kSteps; ++i) rows.insert(rows.end(), {i, 2 * i, 450 - i});
  const std::vector<std::int32_t> ones(kBatch, 1);
  const DeviceArray all_rows(rows), leftpad(ones), num_tokens(ones);
  Step step{900, 0, ones, ones};

  REQUIRE(cudaDeviceSynchronize() == cudaSuccess);  // the stream waits for no copy
  cudaStream_t stream = nullptr;
  REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  const auto feed = [&](int i) {
    REQUIRE(cudaMemcpyAsync(leftpad.data(), all_rows.data() + i * kBatch, kBatch * sizeof(int),
                            cudaMemcpyDeviceToDevice, stream) == cudaSuccess);
  };
  const auto append = [&] {
    inputs.device.enqueue(cache, step, leftpad.data(), num_tokens.data(), stream);
  };
  feed(0);
  append();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  append();
  REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  REQUIRE(cudaGraphInstantiate(&replay, graph, 0) == cudaSuccess);
  for (int i = 1; i < kSteps; ++i) {
    feed(i);
    REQUIRE(cudaGraphLaunch(replay, stream) == cudaSuccess);
  }
  const CacheBox replayed = cache.host();
  (void)cudaGraphExecDestroy(replay);
  (void)cudaGraphDestroy(graph);
  (void)cudaStreamDestroy(stream);

  for (int i = 0; i < kSteps; ++i) {
    step.leftpad.assign(rows.begin() + i * kBatch, rows.begin() + (i + 1) * kBatch);
    append_on_cpu(box, inputs.k, inputs.v, step);
  }
  CHECK(difference(box, replayed) == "");
  CHECK(inputs.device.counters_are_zero());
  CHECK(inputs.device.error_word()[0] == 0);
}

TEST_CASE("what the host can see is refused before anything is launched") {
  CacheBox box({}, {kBatch, kHeads, 512, 16, 64});
  const Inputs inputs(ElementType::f16, 128);
  int counters[kBatch] = {};
  const Step step{1, 0, {}, {}};
  AppendProblem p = problem_of(box.view(), inputs.k.at(inputs.k.values.data()),
                               inputs.v.at(inputs.v.values.data()), step, nullptr, nullptr);
  const auto text = [&] { return append_tokens(p, counters, CudaExecution{}).text(); };
  CHECK(append_tokens(p, nullptr, CudaExecution{}).text() ==
        "counters = null; allowed: an array [B]");
  p.k.type = ElementType::f32;
  CHECK(text() == "k dtype = float32; allowed on a CUDA device: float16, bfloat16");
  p.k.type = ElementType::f16;
  p.v.head_stride += 4;
  CHECK(text().find("v stride = 132 elements; allowed") == 0);
  p.cache.tail_tokens = 16;
  CHECK(text().find("tail_tokens = 16; allowed: 192") == 0);
}

}  // namespace bitdecoding::test
