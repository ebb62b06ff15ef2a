// SPDX-License-Identifier: Apache-2.0
// CPU decode against the float64 oracle: formats, zones, lengths, shapes, types, threads.
#include "bitdecoding/decode/decode_problem.hpp"

#include <doctest.h>

#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "bitdecoding/run.hpp"
#include "cpu/cache_box.hpp"
#include "legal_formats.hpp"
#include "oracle.hpp"

namespace bitdecoding {
namespace {

using namespace test;

struct QueryShape {
  int tokens = 1;
  int group = 1;  // query heads per KV head
  ElementType type = ElementType::f32;
};

// Queries with strides of their own, outputs full of NaN.
struct Queries {
  Queries(CacheBox& box, const QueryShape& shape, unsigned seed)
      : q(shape.type, box.cache.batch, shape.tokens, shape.group * box.cache.num_kv_heads,
          box.cache.format.head_dim, seed % 2 == 0) {
    const int heads = shape.group * box.cache.num_kv_heads;
    const int head_dim = box.cache.format.head_dim;
    fill_random(q, box.cache.batch, shape.tokens, heads, head_dim, seed, 0.5f);
    const TokenRows rows = q.rows();
    const std::size_t count = static_cast<std::size_t>(box.cache.batch * shape.tokens * heads);
    out.assign(count * static_cast<std::size_t>(head_dim * element_bytes(shape.type)), 0xff);
    lse.assign(count, NAN);
    problem.cache = box.view();
    problem.query_tokens = shape.tokens;
    problem.query_heads = heads;
    problem.softmax_scale = 1.f / std::sqrt(static_cast<float>(head_dim));
    problem.type = shape.type;
    problem.q = rows.data;
    problem.q_batch_stride = rows.batch_stride;
    problem.q_token_stride = rows.token_stride;
    problem.q_head_stride = rows.head_stride;
    problem.out = out.data();
    problem.lse = lse.data();
  }

  double output(std::size_t index) const {
    if (problem.type == ElementType::f32) {
      float value;
      std::memcpy(&value, out.data() + index * 4, 4);
      return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, out.data() + index * 2, 2);
    return problem.type == ElementType::f16 ? format::float_from_fp16(bits)
                                            : format::float_from_bf16(bits);
  }

  TokenArray q;
  std::vector<std::uint8_t> out;
  std::vector<float> lse;
  DecodeProblem problem;
};

double rounding_error(ElementType type, double value) {
  if (type == ElementType::f16) return std::abs(value) * 0x1p-11 + 0x1p-25;
  return std::abs(value) * (type == ElementType::bf16 ? 0x1p-8 : 0x1p-24);
}

void append_random(CacheBox& box, const std::vector<int>& lengths, unsigned seed) {
  const int longest = std::max(1, *std::max_element(lengths.begin(), lengths.end()));
  const int batch = box.cache.batch, heads = box.cache.num_kv_heads, d = box.cache.format.head_dim;
  TokenArray k(ElementType::f32, batch, longest, heads, d, seed % 2 == 0);
  TokenArray v(ElementType::bf16, batch, longest, heads, d, seed % 2 == 1);
  fill_random(k, batch, longest, heads, d, seed);
  fill_random(v, batch, longest, heads, d, seed + 1);
  AppendProblem problem{box.view(), k.rows(), v.rows(), {batch, longest, nullptr, lengths.data()}};
  const Status status = append_tokens(problem, CpuExecution{});
  REQUIRE_MESSAGE(status.is_ok(), status.text());
  box.poison_unused();
}

// Runs the problem and holds every output against the oracle.
void check_decode(CacheBox& box, Queries& queries, int threads = 0) {
  const DecodeProblem& p = queries.problem;
  const Status status = decode_attention(p, CpuExecution{threads});
  REQUIRE_MESSAGE(status.is_ok(), status.text());
  const int group = p.query_heads / p.cache.num_kv_heads, d = p.cache.format.head_dim;
  const KvFormat& format = p.cache.format;
  std::vector<double> q(static_cast<std::size_t>(d));
  for (int b = 0; b < p.cache.batch; ++b) {
    DequantizedHead dequantized;
    for (int head = 0; head < p.query_heads; ++head) {
      if (head % group == 0) dequantized = dequantize(box.view(), b, head / group);
      for (int token = 0; token < p.query_tokens; ++token) {
        for (int c = 0; c < d; ++c)
          q[static_cast<std::size_t>(c)] = queries.q.get(b, token, head, c);
        Attention expected =
            attend(dequantized, rotated(q, format.k_rotation).data(), double{p.softmax_scale});
        expected.out = rotated(expected.out, format.v_rotation);
        expected.out_error = rotated(expected.out_error, format.v_rotation, true);
        const std::vector<float> mean = box.mean_of(head / group);
        for (std::size_t c = 0; c < mean.size(); ++c) {
          expected.lse += q[c] * mean[c] * double{p.softmax_scale};
        }
        const std::size_t row =
            static_cast<std::size_t>((b * p.query_tokens + token) * p.query_heads + head);
        for (int c = 0; c < d; ++c) {
          const double want = expected.out[static_cast<std::size_t>(c)];
          const double got =
              queries.output(row * static_cast<std::size_t>(d) + static_cast<std::size_t>(c));
          const double allowed =
              expected.out_error[static_cast<std::size_t>(c)] + rounding_error(p.type, want);
          const double error = std::abs(got - want);
          if (!(error <= allowed)) {
            FAIL(name(p.cache.format), " length ", dequantized.length, " sequence ", b, " head ",
                 head, " token ", token, " channel ", c, ": ", got, ", expected ", want, " +- ",
                 allowed);
          }
        }
        const double lse = p.lse[(b * p.query_heads + head) * p.query_tokens + token];
        const bool same = lse == expected.lse;  // -inf
        REQUIRE((same || std::abs(lse - expected.lse) <= expected.lse_error));
      }
    }
  }
}

TEST_CASE("every legal format, ragged lengths, every query type") {
  const ElementType types[] = {ElementType::f32, ElementType::f16, ElementType::bf16};
  unsigned seed = 0;
  for (const KvFormat& format : all_formats()) {
    ++seed;
    const int keep_first = static_cast<int>(seed % 3) * 16;
    const int keep_last = static_cast<int>(seed % 4) * 32;
    CacheBox box(format, {3, 2, 512, keep_first, keep_last, 1, seed % 5 == 0}, seed);
    append_random(box, {static_cast<int>(seed * 37 % 300), 130 + static_cast<int>(seed % 160), 64},
                  seed);
    Queries queries(
        box, {1 + static_cast<int>(seed % 2), 1 + static_cast<int>(seed % 5), types[seed % 3]},
        seed);
    check_decode(box, queries);
  }
}

std::vector<KvFormat> one_format_per_page_config() {
  std::vector<KvFormat> formats;
  for (const KvFormat& f : legal_formats()) {
    const int longest =
        f.k_axis == KAxis::channel ? f.page_tokens : std::min(f.head_dim, kMostGroupChannels);
    const bool norm = f.k_bits == f.v_bits;
    const bool groups = f.has_blocks() || (f.k_group == longest && f.v_group == 64);
    if (groups && f.page_tokens == 128 && f.token_norm == (norm && !f.has_blocks())) {
      formats.push_back(f);
    }
  }
  return formats;
}

TEST_CASE("zones and every boundary of lengths") {
  struct Zones {
    int first, last;
  };
  const auto formats = one_format_per_page_config();
  REQUIRE(formats.size() == 36);
  unsigned seed = 0;
  for (const Zones& zones :
       {Zones{0, 0}, Zones{16, 64}, Zones{1, 1}, Zones{64, 0}, Zones{128, 100}}) {
    std::set<int> lengths;
    for (const int edge : {0, 1, 16, 32, 64, 128, 192, 256, zones.first, zones.last,
                           zones.last + 128, zones.last + 256, zones.last + 512 + 128}) {
      for (const int length : {edge - 1, edge, edge + 1}) lengths.insert(std::max(0, length));
    }
    for (const KvFormat& format : formats) {
      ++seed;
      std::vector<int> all;  // every other one: twelve formats see each
      unsigned turn = seed;
      for (const int length : lengths) {
        if (++turn % 2 == 0) all.push_back(length);
      }
      CacheBox box(format, {static_cast<int>(all.size()), 1, 1024, zones.first, zones.last}, seed);
      append_random(box, all, seed);
      Queries queries(box, {1, 1 + static_cast<int>(seed % 3)}, seed);
      check_decode(box, queries);
    }
  }
}

TEST_CASE("many query rows: row tiles, and items of several segments") {
  CacheBox box({.k_bits = 4, .v_bits = 2, .v_group = 64, .head_dim = 64}, {1, 2, 2048}, 5);
  append_random(box, {1900}, 5);
  Queries queries(box, {150, 5}, 5);
  check_decode(box, queries);
}

TEST_CASE("thread counts give the same bits") {
  for (const KvFormat& format : one_format_per_page_config()) {
    CacheBox box(format, {2, 4, 4096}, 7);
    append_random(box, {3000, 700}, 7);
    Queries one(box, {2, 4}, 7), two(box, {2, 4}, 7), five(box, {2, 4}, 7);
    REQUIRE(decode_attention(one.problem, CpuExecution{1}).is_ok());
    REQUIRE(decode_attention(two.problem, CpuExecution{2}).is_ok());
    REQUIRE(decode_attention(five.problem, CpuExecution{5}).is_ok());
    CHECK(one.out == two.out);
    CHECK(one.out == five.out);
    CHECK(one.lse == two.lse);
    CHECK(one.lse == five.lse);
  }
}

TEST_CASE("a NaN key spoils its head and no other") {
  CacheBox box({}, {1, 3, 512, 0, 0}, 9);
  TokenArray k(ElementType::f32, 1, 256, 3, 128, false), v = k;
  fill_random(k, 1, 256, 3, 128, 1);
  fill_random(v, 1, 256, 3, 128, 2);
  k.set(0, 70, 1, 5, NAN);
  const AppendProblem append{box.view(), k.rows(), v.rows(), {1, 256, nullptr, nullptr}};
  REQUIRE(append_tokens(append, CpuExecution{}).is_ok());
  Queries queries(box, {1, 2}, 9);
  REQUIRE(decode_attention(queries.problem, CpuExecution{}).is_ok());
  for (std::size_t i = 0; i < 6 * 128; ++i) {
    const bool spoilt = i / 256 == 1;
    REQUIRE(std::isnan(queries.output(i)) == spoilt);
  }
}

TEST_CASE("nothing to attend and nothing to ask") {
  CacheBox box({}, {2, 1, 256}, 3);
  Queries queries(box, {1, 2}, 3);
  check_decode(box, queries);  // two empty sequences: 0 and -inf
  queries.problem.query_tokens = 0;
  CHECK(decode_attention(queries.problem, CpuExecution{}).is_ok());
}

}  // namespace
}  // namespace bitdecoding
