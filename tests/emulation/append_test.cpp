// SPDX-License-Identifier: Apache-2.0
// The append kernel's device code, run by the CPU: whatever the format, the zones, the steps and
// the schedule, a cache is byte for byte that of the CPU backend; of a sequence with a fault
// nothing is written, and it is reported. EMULATION_SEED=<number> draws other cases.
#include "cuda_on_host.hpp"

// Device code comes behind the emulation, where it finds CUDA's names.
#include <doctest.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <functional>
#include <string>

#include "bitdecoding/quantize/append_kernel.cuh"
#include "bitdecoding/run.hpp"
#include "cpu/cache_box.hpp"
#include "legal_formats.hpp"

namespace bitdecoding::test {
namespace {

using emulation::GuardedArray;
using emulation::Landing;
using layout::PageConfig;

constexpr int kBatch = 3;
constexpr int kHeads = 2;
constexpr int kRowTokens = 400;  // S of the arrays; a call may use fewer

struct Inputs {
  Inputs(ElementType type, int head_dim, unsigned seed)
      : k(type, kBatch, kRowTokens, kHeads, head_dim, seed % 2 == 0),
        v(type, kBatch, kRowTokens, kHeads, head_dim, seed % 3 == 0) {
    fill_random(k, kBatch, kRowTokens, kHeads, head_dim, seed);
    fill_random(v, kBatch, kRowTokens, kHeads, head_dim, seed + 1);
  }

  TokenArray k, v;
};

// One call's tokens: the same for both back ends.
struct Step {
  int row_tokens;                                 // S
  int row;                                        // of the arrays, at which rows begin
  std::vector<std::int32_t> leftpad, num_tokens;  // empty: not given
  int max_tokens = INT_MAX;
};

Step draw_step(int tokens, std::mt19937& random) {
  const auto below = [&](int end) { return static_cast<int>(random() % unsigned(end + 1)); };
  Step step{tokens, below(kRowTokens - tokens), {}, {}};
  if (below(1) == 0) return step;
  for (int b = 0; b < kBatch; ++b) {
    const int count = b == tokens % kBatch ? tokens : below(tokens);
    step.num_tokens.push_back(count);
    step.leftpad.push_back(below(tokens - count));
  }
  if (below(3) == 0) step.num_tokens.clear();
  return step;
}

AppendProblem problem_of(const PagedKvCache& cache, const Inputs& inputs, const Step& step) {
  const auto at = [&](TokenRows rows) {
    rows.data = static_cast<const std::uint16_t*>(rows.data) + step.row * rows.token_stride;
    return rows;
  };
  return {cache,
          at(inputs.k.rows()),
          at(inputs.v.rows()),
          {cache.batch, step.row_tokens, step.leftpad.empty() ? nullptr : step.leftpad.data(),
           step.num_tokens.empty() ? nullptr : step.num_tokens.data()},
          step.max_tokens};
}

void append_on_cpu(CacheBox& box, const Inputs& inputs, const Step& step) {
  const Status status = append_tokens(problem_of(box.view(), inputs, step), CpuExecution{});
  REQUIRE_MESSAGE(status.is_ok(), status.text());
}

// Sequences know nothing of each other: one after the other, each with all its CTAs.
template <PageConfig Config>
void run(const AppendProblem& p, int* counters, int* error_word, std::mt19937& random) {
  const layout::PageRecord record(p.cache.format);
  const int ctas = p.cache.num_kv_heads * (1 + 2 * most_new_pages(p.cache, p.runs.row_tokens));
  for (int b = 0; b < p.cache.batch; ++b) {
    const emulation::Grid grid{ctas, quantize::kPackThreads,
                               sizeof(quantize::AppendStorage<Config.head_dim>), 0, b};
    const auto landing = static_cast<Landing>(random() % 3);
    const int late_cta = static_cast<int>(random() % unsigned(ctas + 1)) - 1;
    emulation::Machine machine(grid, landing, late_cta, random);
    machine.run([&](std::uint8_t* shared) {
      quantize::append_by_cta<Config>(
          p, record, *reinterpret_cast<quantize::AppendStorage<Config.head_dim>*>(shared), counters,
          error_word);
    });
  }
}

// By the kernel of the format's page configuration.
void run_any(const AppendProblem& p, int* counters, int* error_word, std::mt19937& random) {
  const KvFormat& f = p.cache.format;
  const auto by_axis = [&]<int KBits, int VBits, int HeadDim> {
    const auto run_of = [&]<KAxis Axis> {
      run<PageConfig{KBits, VBits, Axis, HeadDim}>(p, counters, error_word, random);
    };
    if (f.k_axis == KAxis::channel) return run_of.template operator()<KAxis::channel>();
    if (f.has_blocks()) return run_of.template operator()<KAxis::block>();
    return run_of.template operator()<KAxis::token>();
  };
  const auto by_head_dim = [&]<int KBits, int VBits> {
    switch (f.head_dim) {
      case 64: return by_axis.template operator()<KBits, VBits, 64>();
      case 128: return by_axis.template operator()<KBits, VBits, 128>();
      default: return by_axis.template operator()<KBits, VBits, 256>();
    }
  };
  const auto by_v_bits = [&]<int KBits> {
    return f.v_bits == 2 ? by_head_dim.template operator()<KBits, 2>()
                         : by_head_dim.template operator()<KBits, 4>();
  };
  return f.k_bits == 2 ? by_v_bits.template operator()<2>() : by_v_bits.template operator()<4>();
}

// A box's cache between inaccessible pages; what the kernel may not write cannot be written.
class EmulatedCache {
 public:
  explicit EmulatedCache(const CacheBox& box)
      : box_(box),
        pool_(copy(box.pool)),
        side_(copy(box.side)),
        lengths_(copy(box.lengths)),
        packed_(copy(box.packed)),
        block_table_(box.block_table),
        slots_(box.slots),
        mean_(box.mean) {}

  // Returns the error word.
  std::vector<int> append(const Inputs& inputs, const Step& step, std::mt19937& random) const {
    const GuardedArray<int> counters(kBatch), error_word(kErrorWord_ints);
    AppendProblem p = problem_of(view(), inputs, step);
    const GuardedArray<std::int32_t> leftpad(step.leftpad), num_tokens(step.num_tokens);
    if (p.runs.leftpad != nullptr) p.runs.leftpad = leftpad.data();
    if (p.runs.num_tokens != nullptr) p.runs.num_tokens = num_tokens.data();
    run_any(p, counters.data(), error_word.data(), random);
    CHECK(std::ranges::count(counters, 0) == kBatch);
    return {error_word.begin(), error_word.end()};
  }

  CacheBox box() const {
    CacheBox box = box_;
    std::ranges::copy(pool_, box.pool.begin());
    std::ranges::copy(side_, box.side.begin());
    std::ranges::copy(lengths_, box.lengths.begin());
    std::ranges::copy(packed_, box.packed.begin());
    return box;
  }

 private:
  template <class T>
  static GuardedArray<T> copy(const std::vector<T>& values) {
    GuardedArray<T> array(values.size());
    std::ranges::copy(values, array.begin());
    return array;
  }
  PagedKvCache view() const {
    PagedKvCache c = box_.cache;
    c.pool = reinterpret_cast<std::uint8_t*>(pool_.data());
    c.side = reinterpret_cast<std::uint16_t*>(side_.data());
    c.lengths = lengths_.data();
    c.packed = packed_.data();
    c.block_table = block_table_.data();
    c.slots = slots_.data();
    if (!box_.mean.empty()) c.k_mean = reinterpret_cast<const std::uint16_t*>(mean_.data());
    return c;
  }

  CacheBox box_;
  GuardedArray<Piece> pool_, side_;
  GuardedArray<std::int32_t> lengths_, packed_, block_table_, slots_;
  GuardedArray<Piece> mean_;
};

void check_same(const CacheBox& cpu, const CacheBox& emulated) {
  CHECK(cpu.pool == emulated.pool);
  CHECK(cpu.side == emulated.side);
  CHECK(cpu.lengths == emulated.lengths);
  CHECK(cpu.packed == emulated.packed);
}

void check_steps(CacheBox& box, const Inputs& inputs, const std::vector<int>& tokens,
                 std::mt19937& random) {
  const EmulatedCache emulated(box);
  for (const int count : tokens) {
    CAPTURE(count);
    const Step step = draw_step(count, random);
    append_on_cpu(box, inputs, step);
    CHECK(emulated.append(inputs, step, random) == std::vector<int>(kErrorWord_ints, 0));
    check_same(box, emulated.box());
  }
}

unsigned first_seed() {
  const char* seed = std::getenv("EMULATION_SEED");
  return seed == nullptr ? 1u : static_cast<unsigned>(std::stoul(seed));
}

struct Zones {
  int first, last;
};
constexpr Zones kZones[] = {{0, 0}, {16, 64}, {5, 30}, {50, 200}};

}  // namespace

TEST_CASE("bytes equal the CPU backend's, in steps of any size") {
  unsigned seed = first_seed();
  std::vector<KvFormat> formats = clipped_formats();
  std::mt19937 random(seed);
  std::ranges::shuffle(formats, random);
  formats.resize(48);
  formats.push_back({.v_bits = 2, .k_axis = KAxis::block, .k_group = 32, .v_group = 32});
  for (const KvFormat& f : rotated_formats()) formats.push_back(f);
  std::vector<int> steps = {1, 1, 17, 64, 129, 330};
  for (const KvFormat& f : formats) {
    random.seed(++seed);
    std::ranges::shuffle(steps, random);
    const Zones zones = kZones[random() % 4];
    const int max_append = random() % 2 == 0 ? 1 : static_cast<int>(random() % 200) + 1;
    const bool has_mean = random() % 3 == 0;
    CacheBox box(f, {kBatch, kHeads, 600, zones.first, zones.last, max_append, has_mean}, seed);
    const ElementType type = random() % 2 == 0 ? ElementType::f16 : ElementType::bf16;
    INFO(name(f), " seed ", seed, " zones ", zones.first, "/", zones.last, " tail rows ",
         box.cache.tail_tokens);
    check_steps(box, Inputs(type, f.head_dim, seed), steps, random);
  }
}

TEST_CASE("what a mean that isn't finite spoils, it spoils on both") {
  std::mt19937 random(first_seed());
  for (const int rotation : {0, 16, 64}) {
    const KvFormat f{
        .k_group = 32, .v_group = 64, .page_tokens = 64, .head_dim = 64, .k_rotation = rotation};
    CAPTURE(rotation);
    CacheBox box(f, {kBatch, kHeads, 600, 16, 20, 8, true});
    auto* mean = reinterpret_cast<std::uint16_t*>(box.mean.data());
    mean[3] = 0x7c00;   // inf
    mean[20] = 0xfc00;  // -inf
    mean[f.head_dim + 40] = 0x7e01;
    check_steps(box, Inputs(ElementType::f16, f.head_dim, 3), {200, 1, 90}, random);
  }
}

TEST_CASE("token by token over page boundaries, after a rollback, and around the ring") {
  std::mt19937 random(first_seed());
  const KvFormat f{.k_group = 32, .v_group = 64, .page_tokens = 64, .head_dim = 64};
  const Inputs inputs(ElementType::bf16, f.head_dim, 3);
  CacheBox box(f, {kBatch, kHeads, 600, 16, 20, 8});
  check_steps(box, inputs, {200, 7}, random);
  check_steps(box, inputs, std::vector<int>(70, 1), random);
  for (int& length : box.lengths) length -= std::min(length, 7);
  check_steps(box, inputs, {1, 5, 64, 3}, random);
}

namespace {

// Three sequences of 300, 390 and 250 tokens (keep_last 64, five pages of 128), and the next call.
struct Calls {
  explicit Calls(const Inputs& inputs) : box({.v_bits = 2}, {kBatch, kHeads, 512, 16, 64}) {
    append_on_cpu(box, inputs, {390, 0, {0, 0, 0}, {300, 390, 250}});
  }
  // 130 tokens each; to sequence 1 others.
  void take(int leftpad, int num_tokens) {
    step.leftpad[1] = leftpad;
    step.num_tokens[1] = num_tokens;
  }

  CacheBox box;
  Step step{300, 100, {170, 170, 170}, {130, 130, 130}};
};

struct FaultCase {
  Fault fault;
  std::function<void(Calls&)> spoil;  // sequence 1
};

std::vector<FaultCase> fault_cases(const PagedKvCache& c) {
  using enum DeviceError;
  const int pages = c.num_pages, slots = c.num_slots, tail = c.tail_tokens;
  return {
      {{run, -1, 300}, [](Calls& c) { c.take(-1, 130); }},
      {{run, 131, 300}, [](Calls& c) { c.take(170, 131); }},
      {{slot, slots, slots}, [slots](Calls& c) { c.box.slots[1] = slots; }},
      {{length, -5, tail}, [](Calls& c) { c.box.lengths[1] = -5; }},
      {{packed, 100, 640}, [](Calls& c) { c.box.packed[1] = 100; }},
      {{grown_length, 520, 519}, [](Calls& c) { c.step.max_tokens = 519; }},
      // A page whose tokens all lie in the ring, and one of new tokens alone.
      {{page_id, pages, pages}, [pages](Calls& c) { c.box.block_table[5 + 2] = pages; }},
      {{page_id, -1, pages}, [](Calls& c) { c.take(0, 250), c.box.block_table[5 + 3] = -1; }},
  };
}

}  // namespace

TEST_CASE("a sequence with a fault is reported and not written, the others are right") {
  std::mt19937 random(first_seed());
  const Inputs inputs(ElementType::bf16, 128, 5);
  const Calls sound(inputs);
  CacheBox expected = sound.box;
  Step others = sound.step;
  others.num_tokens[1] = 0;
  append_on_cpu(expected, inputs, others);
  for (const FaultCase& bad : fault_cases(sound.box.cache)) {
    Calls calls = sound;
    bad.spoil(calls);
    expected.lengths[1] = calls.box.lengths[1];
    expected.packed[1] = calls.box.packed[1];
    const EmulatedCache emulated(calls.box);
    const Fault& f = bad.fault;
    CHECK(emulated.append(inputs, calls.step, random) ==
          std::vector<int>{2, f.value, f.limit, static_cast<int>(f.error)});
    check_same(expected, emulated.box());
  }
}

}  // namespace bitdecoding::test
