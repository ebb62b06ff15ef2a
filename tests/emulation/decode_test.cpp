// SPDX-License-Identifier: Apache-2.0
// The decode kernel's device code, run by the CPU, beside the CPU backend over the same cache:
// random ragged batches, grids and schedules, NaN in all memory that doesn't count and in some that
// does. The same cases in every run; EMULATION_SEED=<number> in the environment draws others.
#include "cuda_on_host.hpp"

// Device code comes behind the emulation, where it finds CUDA's names.
#include <doctest.h>

#include <cstdlib>
#include <string>

#include "bitdecoding/decode/launch.cuh"
#include "decode_case.hpp"
#include "oracle.hpp"

namespace bitdecoding::test {
namespace {

using emulation::GuardedArray;
using emulation::Landing;

template <decode::Arch A, int KBits, int VBits, KAxis Axis, int HeadDim, int Columns>
struct Row {
  static constexpr decode::DecodeConfig config{A, {KBits, VBits, Axis, HeadDim}, Columns};
};

// ---- what is expected ----
struct Expected {
  std::vector<float> out;           // (B,Sq,Hq,D)
  std::vector<float> lse;           // (B,Hq,Sq)
  std::vector<double> score_error;  // (B,Sq,Hq)
};

// The largest |code * scale| + |zero| of every channel.
std::vector<double> largest_keys(const PagedKvCache& cache, int sequence, int kv_head) {
  const DequantizedHead head = dequantize(cache, sequence, kv_head);
  std::vector<double> largest(cache.format.head_dim);
  for (std::size_t i = 0; i < head.k_size.size(); ++i) {
    double& channel = largest[i % largest.size()];
    channel = std::max(channel, head.k_size[i]);
  }
  return largest;
}

// How far scores may be off; what is summed over the channels is rounded independently, and 3 times
// the root of the sum of squares is more than 5 standard deviations. Where K has scales per channel
// the kernel rounds Q' = q * scale to fp16, by 2^-11 of every product with a code at most; where
// scales are powers of two, by nothing. A query that is rotated is rounded itself, too. Bytes are
// fixed point besides: q or Q' lose about 2^-15 of the largest at most, times every code.
std::vector<double> score_errors(const DecodeInputs& inputs, const DecodeCase& c,
                                 decode::Product product) {
  const DecodeProblem& p = inputs.problem;
  const bool per_channel = c.format.k_axis == KAxis::channel;
  const int rotation = c.format.k_rotation;
  const bool in_steps = c.in_steps && !c.format.token_norm && rotation == 0 && !c.shape.has_mean;
  const int roundings = (per_channel && !in_steps ? 1 : 0) + (rotation != 0 ? 1 : 0);
  std::vector<double> errors(inputs.rows());
  for (int b = 0; b < p.cache.batch; ++b) {
    for (int head = 0; head < p.query_heads; ++head) {
      const std::vector<double> keys = largest_keys(p.cache, b, head / c.group);
      const double largest_key = *std::max_element(keys.begin(), keys.end());
      for (int token = 0; token < p.query_tokens; ++token) {
        double squares = 0., largest = 0.;
        std::vector<double> query;
        for (int i = 0; i < c.format.head_dim; ++i) {
          query.push_back(inputs.query(b, token, head, i));
        }
        query = rotated(query, rotation);
        for (int i = 0; i < c.format.head_dim; ++i) {
          const double q = std::abs(query[static_cast<std::size_t>(i)]);
          squares += q * keys[i] * q * keys[i];
          largest = std::max(largest, q * (per_channel ? keys[i] : largest_key));
        }
        double error = roundings * 0x1p-11 * std::sqrt(squares);
        if (product == decode::Product::bytes) {
          error += 0x1p-15 * std::sqrt(c.format.head_dim) * largest;
        }
        errors[(b * p.query_tokens + token) * p.query_heads + head] =
            3. * error * std::abs(p.softmax_scale);
      }
    }
  }
  return errors;
}

Expected on_cpu(const DecodeInputs& inputs, const DecodeCase& c, decode::Product product) {
  std::vector<float> wide(inputs.q.size());
  std::transform(inputs.q.begin(), inputs.q.end(), wide.begin(),
                 [&](std::uint16_t bits) { return widen(bits, c.type); });
  Expected expected{std::vector<float>(inputs.rows() * c.format.head_dim),
                    std::vector<float>(inputs.rows()), score_errors(inputs, c, product)};
  DecodeProblem p = inputs.problem;
  p.type = ElementType::f32;
  p.q = wide.data();
  p.out = expected.out.data();
  p.lse = expected.lse.data();
  const Status status = decode_attention(p, CpuExecution{1});
  REQUIRE_MESSAGE(status.is_ok(), status.text());
  return expected;
}

// ---- the kernel ----
// As plan_decode makes one, but for the rings and the grid, which are the case's.
template <class Row>
decode::DecodePlan plan(const DecodeCase& c) {
  using Partial = decode::Partial<decode::Shape<Row::config>>;
  decode::DecodePlan plan{.format = c.format, .config = Row::config};
  plan.ctas = c.ctas;
  plan.warps = c.warps;
  plan.stages = c.stages;
  plan.packed_chunks = c.packed_chunks;
  const int packed_bytes = layout::PageRecord(c.format).chunk(c.packed_chunks);
  plan.stage_bytes =
      layout::round_up(std::max(packed_bytes, decode::kLeastStageBytes<Row::config>), 128);
  const int streams = c.warps / decode::stream_warps(Row::config);
  plan.smem_bytes = static_cast<int>(
      streams * (c.stages * plan.stage_bytes + decode::stream_storage_bytes<Row::config>()) +
      c.warps * sizeof(decode::WarpStorage) + sizeof(decode::CtaStorage));
  plan.workspace_bytes =
      decode::kCounterBytes + static_cast<std::size_t>(c.ctas * (streams + 2)) * sizeof(Partial);
  return plan;
}

template <class Row>
void launch(const decode::DecodeArguments& a, const decode::DecodePlan& plan, int late_cta,
            Draw& draw) {
  constexpr Landing kLandings[] = {Landing::at_once, Landing::at_any_time, Landing::when_awaited};
  const emulation::Grid grid{plan.ctas, plan.warps * 32, plan.smem_bytes};
  emulation::Machine machine(grid, draw.one_of(kLandings), late_cta, draw.random);
  machine.run([&](std::uint8_t* shared) { decode::DecodeCta<Row::config>(a, shared).run(); });
}

struct Result {
  std::vector<std::uint16_t> out;
  std::vector<std::uint32_t> lse;  // bits: NaN equals NaN
  int error_word[kErrorWord_ints] = {};
};

// All launches are on one workspace, and give the same bits.
template <class Row>
Result on_machine(const DecodeInputs& inputs, const DecodeCase& c, Draw& draw) {
  const CacheBox& box = inputs.box;
  const GuardedArray<std::uint8_t> pool(box.pool);
  const GuardedArray<std::uint16_t> side(box.side), q(inputs.q);
  const GuardedArray<std::int32_t> block_table(box.block_table), slots(box.slots);
  const GuardedArray<std::int32_t> lengths(box.lengths), packed(box.packed);
  const GuardedArray<std::uint16_t> k_mean(box.mean);
  DecodeProblem p = inputs.problem;
  p.cache.pool = pool.data();
  p.cache.side = side.data();
  p.cache.block_table = block_table.data();
  p.cache.slots = slots.data();
  p.cache.lengths = lengths.data();
  p.cache.packed = packed.data();
  if (!box.mean.empty()) p.cache.k_mean = k_mean.data();
  p.q = q.data();
  const decode::DecodePlan plan = test::plan<Row>(c);
  const GuardedArray<std::uint8_t> workspace(plan.workspace_bytes);
  workspace.poison();
  std::memset(workspace.data(), 0, decode::kCounterBytes);
  Result first;
  for (int late_cta = -1; late_cta < c.late_ctas; ++late_cta) {
    Result result;
    const GuardedArray<std::uint16_t> out(inputs.rows() * c.format.head_dim);
    const GuardedArray<float> lse(inputs.rows());
    out.poison();
    lse.poison();
    p.out = out.data();
    p.lse = lse.data();
    const Status status = validate_for_cuda(p);
    REQUIRE_MESSAGE(status.is_ok(), status.text());
    launch<Row>(decode::decode_arguments(p, plan, workspace.data(), result.error_word), plan,
                late_cta, draw);
    result.out.assign(out.begin(), out.end());
    for (const float x : lse) result.lse.push_back(std::bit_cast<std::uint32_t>(x));
    const auto* counters = reinterpret_cast<const int*>(workspace.data());
    CHECK(std::count(counters, counters + decode::kWorkspaceCounters, 0) ==
          decode::kWorkspaceCounters);
    if (late_cta < 0) first = result;
    CHECK(result.out == first.out);
    CHECK(result.lse == first.lse);
  }
  return first;
}

// ---- the comparison ---- Weights that are off by factors between e^-2d and e^2d, d the scores'
// error, move an output by (e^2d - 1) |v - out| at most, and values are apart by twice the largest
// magnitude at most. Before codes are summed, weights are rounded to fp16 once or twice, by 2^-11
// of that; or to bytes, each of a chunk's 64 by 2^-17 of the heaviest. At last the output is
// rounded, below fp16's normal numbers by half of 2^-24.
double output_bound(double score_error, double largest_value, ElementType type) {
  const double range = 2. * largest_value, rounding = type == ElementType::f16 ? 0x1p-11 : 0x1p-8;
  return (std::expm1(2. * score_error) + 0x1p-10) * range + rounding * largest_value + 0x1p-25;
}

// fp32 sums err by up to (D + 16) 2^-24 of sum |q k| * |softmax_scale|, which is about 70 at most
// (DecodeInputs): 6e-4, and in truth far less, since roundings have both signs.
constexpr double kLseError = 2e-4;

void compare(const Result& result, const Expected& expected, const DecodeInputs& inputs,
             const std::set<int>& faulty) {
  const DecodeProblem& p = inputs.problem;
  const int d = p.cache.format.head_dim, rows = p.query_tokens * p.query_heads;
  for (int row = 0; row < p.cache.batch * rows; ++row) {
    const int b = row / rows, token = row % rows / p.query_heads, head = row % p.query_heads;
    const int lse_at = (b * p.query_heads + head) * p.query_tokens + token;
    const double lse = std::bit_cast<float>(result.lse[lse_at]), lse_wanted = expected.lse[lse_at];
    const auto out = std::span(result.out).subspan(static_cast<std::size_t>(row) * d, d);
    INFO("sequence ", b, ", query token ", token, ", head ", head);
    if (faulty.contains(b) || std::isnan(lse_wanted)) {
      REQUIRE(std::isnan(lse));
      for (const std::uint16_t bits : out) REQUIRE(std::isnan(widen(bits, p.type)));
      continue;
    }
    const double score_error = expected.score_error[row];
    REQUIRE((lse == lse_wanted || std::abs(lse - lse_wanted) <= kLseError + score_error));
    // A rotation keeps the length of a block: of an error all may come together in one channel.
    const double growth = std::sqrt(std::max(1., double(p.cache.format.v_rotation)));
    const double bound = output_bound(score_error, growth * inputs.largest_value[b], p.type);
    for (int channel = 0; channel < d; ++channel) {
      // An output beyond 65504 counts as 65504: whether it becomes inf is a matter of one rounding.
      const auto finite = [](float x) {
        return std::clamp(x, -format::kFp16Max, format::kFp16Max);
      };
      const double got = finite(widen(out[channel], p.type));
      const double want = finite(expected.out[row * d + channel]);
      const bool same = got == want || (std::isnan(got) && std::isnan(want));
      if (!same && !(std::abs(got - want) <= bound)) {
        FAIL("channel ", channel, ": ", got, ", expected ", want, " +- ", bound);
      }
    }
  }
}

std::string text(const DecodeCase& c) {
  return name(c.format) + ", batch " + std::to_string(c.shape.batch) + " x " +
         std::to_string(c.shape.heads) + ", longest " + std::to_string(c.shape.max_tokens) +
         ", keep_first " + std::to_string(c.shape.keep_first) + ", keep_last " +
         std::to_string(c.shape.keep_last) + ", group " + std::to_string(c.group) +
         ", query tokens " + std::to_string(c.query_tokens) + ", CTAs " + std::to_string(c.ctas) +
         ", warps " + std::to_string(c.warps) + ", stages " + std::to_string(c.stages) +
         ", chunks " + std::to_string(c.packed_chunks) + (c.in_steps ? ", steps" : ", families") +
         ", " + element_name(c.type);
}

int chosen_seed() {
  const char* seed = std::getenv("EMULATION_SEED");
  return seed == nullptr ? 1 : static_cast<int>(std::strtol(seed, nullptr, 10));
}

template <class Row>
void check(Batch batch, int number) {
  constexpr decode::DecodeConfig config = Row::config;
  constexpr layout::PageConfig page = config.page;
  Draw draw({chosen_seed(), number, static_cast<int>(config.arch), page.k_bits, page.v_bits,
             static_cast<int>(page.k_axis), page.head_dim, config.query_columns});
  const DecodeCase c = draw_case(config, batch, draw);
  INFO("EMULATION_SEED=", chosen_seed(), ", case ", number, ": ", text(c));
  DecodeInputs inputs(c, draw);
  spoil_values(inputs.box, c, draw);
  const Expected expected = on_cpu(inputs, c, config.product());
  poison_masked(inputs.box, draw);
  const std::set<int> faulty = add_faults(inputs.box, c.faults, draw);
  const Result result = on_machine<Row>(inputs, c, draw);
  if (faulty.empty()) {
    CHECK(result.error_word[0] == 0);
  } else {
    CHECK(faulty.contains(result.error_word[0] - 1));
  }
  compare(result, expected, inputs, faulty);
}

template <class Row>
void check_batches() {
  using enum Batch;
  int number = 0;
  for (const Batch batch : {one_long, few, few, more_than_lanes, one_for_many_ctas,
                            two_for_many_ctas, few, few, more_than_lanes, few, few, few}) {
    check<Row>(batch, ++number);
  }
}

constexpr KAxis kChannel = KAxis::channel, kToken = KAxis::token, kBlock = KAxis::block;
constexpr decode::Arch kSm80 = decode::Arch::sm80, kSm90 = decode::Arch::sm90;

}  // namespace

TEST_CASE("sm80, 2/2 bits per channel, head_dim 128, 16 columns") {
  check_batches<Row<kSm80, 2, 2, kChannel, 128, 16>>();
}
TEST_CASE("sm80, 4/4 bits per token, head_dim 128, 8 columns") {
  check_batches<Row<kSm80, 4, 4, kToken, 128, 8>>();
}
TEST_CASE("sm80, 4/2 bits per channel, head_dim 64, 8 columns") {
  check_batches<Row<kSm80, 4, 2, kChannel, 64, 8>>();
}
TEST_CASE("sm80, 2/4 bits per token, head_dim 64, 16 columns") {
  check_batches<Row<kSm80, 2, 4, kToken, 64, 16>>();
}
TEST_CASE("sm90, 2/2 bits per token, head_dim 64, 8 columns") {
  check_batches<Row<kSm90, 2, 2, kToken, 64, 8>>();
}
TEST_CASE("sm90, 4/4 bits per channel, head_dim 128, 16 columns") {
  check_batches<Row<kSm90, 4, 4, kChannel, 128, 16>>();
}
TEST_CASE("sm90, 4/2 bits per token, head_dim 128, 16 columns") {
  check_batches<Row<kSm90, 4, 2, kToken, 128, 16>>();
}
TEST_CASE("sm90, 2/4 bits per channel, head_dim 64, 8 columns") {
  check_batches<Row<kSm90, 2, 4, kChannel, 64, 8>>();
}

TEST_CASE("sm90, 2/2 bits per channel, head_dim 128, 4 columns") {
  check_batches<Row<kSm90, 2, 2, kChannel, 128, 4>>();
}
TEST_CASE("sm90, 4/4 bits per token, head_dim 64, 4 columns") {
  check_batches<Row<kSm90, 4, 4, kToken, 64, 4>>();
}
TEST_CASE("sm80, 4/2 bits per channel, head_dim 64, 4 columns") {
  check_batches<Row<kSm80, 4, 2, kChannel, 64, 4>>();
}
TEST_CASE("sm80, 2/4 bits per token, head_dim 128, 4 columns") {
  check_batches<Row<kSm80, 2, 4, kToken, 128, 4>>();
}

TEST_CASE("sm90, 4/4 bits per channel, head_dim 128, 32 columns") {
  check_batches<Row<kSm90, 4, 4, kChannel, 128, 32>>();
}
TEST_CASE("sm90, 2/2 bits per token, head_dim 128, 64 columns") {
  check_batches<Row<kSm90, 2, 2, kToken, 128, 64>>();
}
TEST_CASE("sm90, 4/2 bits per token, head_dim 64, 32 columns") {
  check_batches<Row<kSm90, 4, 2, kToken, 64, 32>>();
}
TEST_CASE("sm90, 2/4 bits per channel, head_dim 64, 64 columns") {
  check_batches<Row<kSm90, 2, 4, kChannel, 64, 64>>();
}

TEST_CASE("sm90, 4/4 bits in blocks, head_dim 128, 4 columns") {
  check_batches<Row<kSm90, 4, 4, kBlock, 128, 4>>();
}
TEST_CASE("sm80, 2/2 bits in blocks, head_dim 64, 4 columns") {
  check_batches<Row<kSm80, 2, 2, kBlock, 64, 4>>();
}
TEST_CASE("sm90, 2/4 bits in blocks, head_dim 128, 8 columns") {
  check_batches<Row<kSm90, 2, 4, kBlock, 128, 8>>();
}
TEST_CASE("sm80, 4/2 bits in blocks, head_dim 64, 16 columns") {
  check_batches<Row<kSm80, 4, 2, kBlock, 64, 16>>();
}
TEST_CASE("sm90, 4/4 bits per channel, head_dim 256, 4 columns") {
  check_batches<Row<kSm90, 4, 4, kChannel, 256, 4>>();
}
TEST_CASE("sm90, 4/4 bits per token, head_dim 256, 8 columns") {
  check_batches<Row<kSm90, 4, 4, kToken, 256, 8>>();
}
TEST_CASE("sm90, 2/2 bits per channel, head_dim 256, 16 columns") {
  check_batches<Row<kSm90, 2, 2, kChannel, 256, 16>>();
}
TEST_CASE("sm80, 4/4 bits per token, head_dim 256, 4 columns") {
  check_batches<Row<kSm80, 4, 4, kToken, 256, 4>>();
}
TEST_CASE("sm80, 2/2 bits per channel, head_dim 256, 8 columns") {
  check_batches<Row<kSm80, 2, 2, kChannel, 256, 8>>();
}
TEST_CASE("sm80, 4/2 bits per channel, head_dim 256, 16 columns") {
  check_batches<Row<kSm80, 4, 2, kChannel, 256, 16>>();
}

TEST_CASE("more than 1024 sequences") {
  check<Row<kSm80, 2, 4, kToken, 64, 16>>(Batch::more_than_lanes_squared, 0);
  check<Row<kSm90, 2, 4, kChannel, 64, 8>>(Batch::more_than_lanes_squared, 0);
}

}  // namespace bitdecoding::test
