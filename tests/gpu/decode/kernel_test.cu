// SPDX-License-Identifier: Apache-2.0
// The decode kernel beside the CPU's decode (fp32 arithmetic) over the same cache: zones, ragged
// lengths, shuffled pages and slots, NaN in unused memory, several query tokens and head ratios.
// Rows of the test's own: the header door, both copy back ends, both K axes, all kinds of products.
#include <doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bitdecoding/decode/launch.cuh"
#include "bitdecoding/format/float16.hpp"
#include "bitdecoding/run.hpp"
#include "device_array.hpp"

namespace bitdecoding::test {
namespace {

template <decode::Arch A, int KBits, int VBits, KAxis Axis, int HeadDim, int Columns>
struct Row {
  static constexpr decode::DecodeConfig config{A, {KBits, VBits, Axis, HeadDim}, Columns};
};

struct Case {
  int heads_kv, group, query_tokens, keep_first, keep_last;
  std::vector<std::int32_t> lengths;
};

const std::vector<Case> kCases = {
    {2, 4, 1, 16, 64, {1000}},
    {2, 4, 1, 16, 64, {64, 1, 0, 127, 128, 129, 511, 640, 2000}},
    {8, 1, 1, 0, 0, {4096, 0, 77, 300}},
    {1, 8, 1, 16, 64, {20000}},
    {3, 3, 1, 16, 64, {5000, 100}},
    {2, 4, 2, 5, 30, {700, 900}},
    {2, 12, 1, 16, 64, {700, 3000}},
    {1, 4, 1, 50, 64, std::vector<std::int32_t>(70, 777)},
    {1, 8, 8, 16, 64, {3000, 0, 129, 700}},
    {2, 16, 5, 16, 64, {30000, 65}},
};

std::vector<std::int32_t> shuffled(int count, std::mt19937& rng) {
  std::vector<std::int32_t> values(static_cast<std::size_t>(count));
  std::iota(values.begin(), values.end(), 0);
  std::shuffle(values.begin(), values.end(), rng);
  return values;
}

// A cache in host memory, filled by the CPU backend.
struct HostCache {
  PagedKvCache cache;
  std::vector<std::uint8_t> pool;
  std::vector<std::uint16_t> side;
  std::vector<std::int32_t> block_table, slots, lengths, packed;
  std::vector<float> k_range;  // [H, D]: largest minus smallest K, all sequences

  HostCache(const KvFormat& f, const Case& c, std::mt19937& rng) {
    const int batch = static_cast<int>(c.lengths.size());
    const int longest = *std::max_element(c.lengths.begin(), c.lengths.end());
    cache.format = f;
    cache.keep_first = c.keep_first;
    cache.keep_last = c.keep_last;
    cache.batch = cache.num_slots = batch;
    cache.num_kv_heads = c.heads_kv;
    cache.tail_tokens = min_tail_tokens(c.keep_last, f.page_tokens, 1);
    cache.max_pages = longest / f.page_tokens + 1;
    cache.num_pages = batch * cache.max_pages;
    pool.assign(static_cast<std::size_t>(cache.num_pages) * c.heads_kv * page_bytes(f), 0xff);
    side.assign(cache.side_offset(batch, 0, 0), format::kFp16NaN);
    block_table = shuffled(cache.num_pages, rng);
    slots = shuffled(batch, rng);
    lengths.assign(static_cast<std::size_t>(batch), 0);
    packed = lengths;
    cache.pool = pool.data();
    cache.side = side.data();
    cache.block_table = block_table.data();
    cache.slots = slots.data();
    cache.lengths = lengths.data();
    cache.packed = packed.data();
    append(c, longest, rng);
  }

  void append(const Case& c, int longest, std::mt19937& rng) {
    const int d = cache.format.head_dim;
    const std::size_t row = static_cast<std::size_t>(c.heads_kv) * d;
    std::normal_distribution<float> normal;
    std::vector<float> k(c.lengths.size() * static_cast<std::size_t>(longest) * row), v(k.size());
    std::vector<float> low(row, 1e9f), high(row, -1e9f);
    for (std::size_t i = 0; i < k.size(); ++i) {
      k[i] = normal(rng);
      v[i] = normal(rng);
      low[i % row] = std::min(low[i % row], k[i]);
      high[i % row] = std::max(high[i % row], k[i]);
    }
    for (std::size_t i = 0; i < row; ++i) k_range.push_back(high[i] - low[i]);
    AppendProblem p;
    p.cache = cache;
    p.k = p.v = {k.data(), ElementType::f32, longest * static_cast<std::int64_t>(row),
                 static_cast<std::int64_t>(row), d};
    p.v.data = v.data();
    p.runs = {cache.batch, longest, nullptr, c.lengths.data()};
    const Status status = append_tokens(p, CpuExecution{});
    REQUIRE_MESSAGE(status.is_ok(), status.text());
  }
};

struct Result {
  std::vector<float> out, lse;
};

struct Queries {
  std::vector<std::uint16_t> q;  // fp16 (B,Sq,Hq,D)
  DecodeProblem problem;         // without pointers

  Queries(const HostCache& host, const Case& c, std::mt19937& rng) {
    const int d = host.cache.format.head_dim;
    problem.cache = host.cache;
    problem.query_tokens = c.query_tokens;
    problem.query_heads = c.heads_kv * c.group;
    problem.softmax_scale = 1.f / std::sqrt(static_cast<float>(d));
    problem.q_head_stride = d;
    problem.q_token_stride = static_cast<std::int64_t>(problem.query_heads) * d;
    problem.q_batch_stride = problem.q_token_stride * c.query_tokens;
    q.resize(c.lengths.size() * static_cast<std::size_t>(problem.q_batch_stride));
    std::normal_distribution<float> normal;
    for (std::uint16_t& x : q) x = format::fp16_from_float(normal(rng));
  }

  std::size_t rows() const { return q.size() / problem.cache.format.head_dim; }

  Result on_cpu() const {
    std::vector<float> wide(q.size());
    std::transform(q.begin(), q.end(), wide.begin(), format::float_from_fp16);
    Result result{std::vector<float>(q.size()), std::vector<float>(rows())};
    DecodeProblem p = problem;
    p.type = ElementType::f32;
    p.q = wide.data();
    p.out = result.out.data();
    p.lse = result.lse.data();
    const Status status = decode_attention(p, CpuExecution{});
    REQUIRE_MESSAGE(status.is_ok(), status.text());
    return result;
  }

  // A bound of the scores' error from rounding Q' = q * scale to fp16: half an ulp of every product
  // with a code, 2^-12 * sum |q| * (largest code * scale), in natural units.
  double score_error(const HostCache& host, const Case& c) const {
    const int d = problem.cache.format.head_dim;
    double worst = 0.;
    for (std::size_t r = 0; r < rows(); ++r) {
      const int head =
          static_cast<int>(r % static_cast<std::size_t>(problem.query_heads)) / c.group;
      double sum = 0.;
      for (int i = 0; i < d; ++i) {
        sum += std::fabs(format::float_from_fp16(q[r * d + i])) * host.k_range[head * d + i];
      }
      worst = std::max(worst, sum);
    }
    return worst * problem.softmax_scale * 0x1p-12;
  }
};

template <class R>
Result on_device(const HostCache& host, const Queries& queries, bool* repeats) {
  const DeviceArray pool(host.pool);
  const DeviceArray side(host.side);
  const DeviceArray block_table(host.block_table), slots(host.slots);
  const DeviceArray lengths(host.lengths), packed(host.packed);
  const DeviceArray q(queries.q);
  DecodeProblem p = queries.problem;
  p.cache.pool = pool.data();
  p.cache.side = side.data();
  p.cache.block_table = block_table.data();
  p.cache.slots = slots.data();
  p.cache.lengths = lengths.data();
  p.cache.packed = packed.data();
  p.q = q.data();
  decode::DecodePlan plan;
  REQUIRE(decode::plan_decode<R>(p.cache.format, &plan) == cudaSuccess);
  const DeviceArray workspace(std::vector<std::uint8_t>(plan.workspace_bytes, 0xff));
  REQUIRE(cudaMemset(workspace.data(), 0, decode::kCounterBytes) == cudaSuccess);
  std::vector<std::uint16_t> first;
  Result result;
  for (int run = 0; run < 3; ++run) {
    const DeviceArray out(std::vector<std::uint16_t>(queries.q.size(), format::kFp16NaN));
    const DeviceArray lse(std::vector<float>(queries.rows(), NAN));
    p.out = out.data();
    p.lse = lse.data();
    REQUIRE(decode::launch_decode<R>(p, plan, workspace.data(), nullptr, nullptr) == cudaSuccess);
    const std::vector<std::uint16_t> bits = out.host();
    if (run == 0) first = bits;
    *repeats = *repeats && bits == first;
    result.lse = lse.host();
  }
  result.out.resize(first.size());
  std::transform(first.begin(), first.end(), result.out.begin(), format::float_from_fp16);
  return result;
}

// This program is built for one architecture: a row may have no code for the GPU that is there.
template <class R>
bool has_code(const KvFormat& f) {
  int device = 0, major = 0;
  REQUIRE(cudaGetDevice(&device) == cudaSuccess);
  REQUIRE(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess);
  decode::DecodePlan plan;
  const bool is_right_arch = R::config.arch == decode::Arch::sm80 || major == 9;
  return is_right_arch && decode::plan_decode<R>(f, &plan) != cudaErrorNoKernelImageForDevice;
}

template <class R>
void check(const KvFormat& f) {
  if (!has_code<R>(f)) {
    MESSAGE("not run: no code for this GPU in this build");
    return;
  }
  unsigned seed = std::random_device{}();
  for (const Case& c : kCases) {
    std::mt19937 rng(++seed);
    const HostCache host(f, c, rng);
    const Queries queries(host, c, rng);
    bool repeats = true;
    const Result expected = queries.on_cpu(), got = on_device<R>(host, queries, &repeats);
    double error = 0., norm = 0., lse_error = 0.;
    for (std::size_t i = 0; i < expected.out.size(); ++i) {
      error += std::pow(double{got.out[i]} - expected.out[i], 2);
      norm += std::pow(double{expected.out[i]}, 2);
    }
    for (std::size_t i = 0; i < expected.lse.size(); ++i) {
      const bool empty = std::isinf(expected.lse[i]);
      CHECK((!empty || got.lse[i] == expected.lse[i]));
      if (!empty) {
        lse_error = std::max(lse_error, std::fabs(double{got.lse[i]} - expected.lse[i]));
      }
    }
    // Weights err by the factor exp(+-score error); values average out over the output's norm.
    const double score_error = queries.score_error(host, c);
    const std::string what = name(f) + " seed " + std::to_string(seed) + " heads " +
                             std::to_string(c.heads_kv) + " group " + std::to_string(c.group);
    CHECK_MESSAGE(std::sqrt(error / norm) <= 1e-3 + score_error, what);
    CHECK_MESSAGE(lse_error <= 1e-3 + score_error, what);
    CHECK_MESSAGE(repeats, what);
    MESSAGE(what << ": relative error " << std::sqrt(error / norm) << ", lse " << lse_error
                 << ", Q' bound " << score_error);
  }
}

constexpr KAxis kChannel = KAxis::channel, kToken = KAxis::token, kBlock = KAxis::block;
constexpr decode::Arch kSm80 = decode::Arch::sm80, kSm90 = decode::Arch::sm90;

}  // namespace

TEST_CASE("sm90, 4-bit per channel") {
  using R = Row<kSm90, 4, 4, kChannel, 128, 8>;
  check<R>({});
  check<R>({.k_group = 32, .v_group = 32});
  check<R>({.k_group = 64, .v_group = 64, .page_tokens = 64, .token_norm = true});
}

TEST_CASE("sm90, 2-bit K per token, 4-bit V, 16 columns") {
  using R = Row<kSm90, 2, 4, kToken, 64, 16>;
  const KvFormat f{.k_bits = 2, .k_axis = kToken, .k_group = 64, .v_group = 64, .head_dim = 64};
  check<R>(f);
  KvFormat g = f;
  g.k_group = g.v_group = 32;
  g.token_norm = true;
  check<R>(g);
}

TEST_CASE("sm80 copies, 4-bit K, 2-bit V") {
  using R = Row<kSm80, 4, 2, kChannel, 64, 8>;
  check<R>({.v_bits = 2, .v_group = 64, .head_dim = 64});
  check<R>({.v_bits = 2, .k_group = 32, .v_group = 32, .head_dim = 64});
}

TEST_CASE("sm80 copies, 2-bit") {
  check<Row<kSm80, 2, 2, kChannel, 128, 8>>({.k_bits = 2, .v_bits = 2});
}

TEST_CASE("sm90, wgmma, 32 columns") {
  check<Row<kSm90, 4, 4, kChannel, 128, 32>>({});
  check<Row<kSm90, 2, 2, kChannel, 128, 32>>({.k_bits = 2, .v_bits = 2, .k_group = 64});
  check<Row<kSm90, 4, 2, kToken, 64, 32>>(
      {.v_bits = 2, .k_axis = kToken, .k_group = 64, .v_group = 64, .head_dim = 64});
}

TEST_CASE("sm90, wgmma, 64 columns") {
  check<Row<kSm90, 2, 2, kChannel, 128, 64>>({.k_bits = 2, .v_bits = 2});
  check<Row<kSm90, 4, 4, kToken, 128, 64>>({.k_axis = kToken});
  check<Row<kSm90, 2, 4, kChannel, 64, 64>>(
      {.k_bits = 2, .k_group = 64, .v_group = 64, .page_tokens = 64, .head_dim = 64});
}

TEST_CASE("sm90, head_dim 256: 4 and 8 columns of a warp, 16 of two") {
  check<Row<kSm90, 4, 4, kChannel, 256, 4>>({.head_dim = 256});
  check<Row<kSm90, 4, 4, kToken, 256, 8>>(
      {.k_axis = kToken, .k_group = 32, .v_group = 32, .head_dim = 256, .token_norm = true});
  check<Row<kSm90, 2, 2, kChannel, 256, 16>>({.k_bits = 2, .v_bits = 2, .head_dim = 256});
}

TEST_CASE("sm80 copies, head_dim 256, 16 columns") {
  using R = Row<kSm80, 4, 2, kChannel, 256, 16>;
  check<R>({.v_bits = 2, .head_dim = 256});
  check<R>({.v_bits = 2, .k_group = 32, .v_group = 64, .head_dim = 256});
}

TEST_CASE("sm90, 2-bit per channel, 4 columns") {
  using R = Row<kSm90, 2, 2, kChannel, 128, 4>;
  check<R>({.k_bits = 2, .v_bits = 2});
  check<R>({.k_bits = 2, .v_bits = 2, .k_group = 32, .v_group = 32, .token_norm = true});
}

TEST_CASE("blocks, 4 and 8 columns") {
  check<Row<kSm90, 4, 4, kBlock, 128, 4>>({.k_axis = kBlock, .k_group = 32, .v_group = 32});
  check<Row<kSm80, 2, 4, kBlock, 64, 8>>({.k_bits = 2,
                                          .k_axis = kBlock,
                                          .k_group = 32,
                                          .v_group = 32,
                                          .page_tokens = 64,
                                          .head_dim = 64});
}

TEST_CASE("sm80 copies, 4-bit K per token, 4 columns") {
  using R = Row<kSm80, 4, 2, kToken, 64, 4>;
  check<R>({.v_bits = 2, .k_axis = kToken, .k_group = 64, .v_group = 64, .head_dim = 64});
  check<R>({.v_bits = 2, .k_axis = kToken, .k_group = 32, .v_group = 32, .head_dim = 64});
}

}  // namespace bitdecoding::test
