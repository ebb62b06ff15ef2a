// SPDX-License-Identifier: Apache-2.0
// A user of the compiled library: appends 300 tokens to a 4-bit cache on the CPU and attends to
// them. Every value is 0.5, which a group of equal values stores exactly, so the answer is 0.5.
#include <bitdecoding/bitdecoding.hpp>
#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  using namespace bitdecoding;
  constexpr int kTokens = 300, kHeads = 2, kQueryHeads = 8, kPages = 3, kChannels = 128;

  PagedKvCache cache{.format = {.k_bits = 4, .v_bits = 4, .head_dim = kChannels}};
  cache.batch = 1;
  cache.num_kv_heads = kHeads;
  cache.num_pages = cache.max_pages = kPages;
  cache.num_slots = 1;
  cache.keep_first = 16;
  cache.keep_last = 64;
  cache.tail_tokens = min_tail_tokens(cache.keep_last, cache.format.page_tokens, 1);

  // The caller owns all memory. Pool and side buffer need 16-byte alignment: operator new has it.
  std::vector<std::uint8_t> pool(kPages * kHeads * page_bytes(cache.format));
  std::vector<std::uint16_t> side(kHeads * 2 * (cache.keep_first + cache.tail_tokens) * kChannels);
  const std::vector<std::int32_t> table{2, 0, 1}, slots{0};
  std::int32_t length = 0, packed = 0;
  cache.pool = pool.data();
  cache.side = side.data();
  cache.block_table = table.data();
  cache.slots = slots.data();
  cache.lengths = &length;
  cache.packed = &packed;

  std::vector<float> k(kTokens * kHeads * kChannels), v(k.size(), 0.5f);  // (1, S, H, D)
  for (std::size_t i = 0; i < k.size(); ++i) k[i] = std::sin(0.1f * static_cast<float>(i));
  const auto rows = [&](const std::vector<float>& x) {
    return TokenRows{x.data(), ElementType::f32, 0, kHeads * kChannels, kChannels};
  };
  Status status = append_tokens({cache, rows(k), rows(v), TokenRuns{1, kTokens}}, CpuExecution{});

  std::vector<float> q(kQueryHeads * kChannels, 0.1f), out(q.size());  // (1, 1, Hq, D)
  DecodeProblem problem{.cache = cache, .query_heads = kQueryHeads, .softmax_scale = 0.09f};
  problem.type = ElementType::f32;
  problem.q = q.data();
  problem.q_head_stride = kChannels;
  problem.out = out.data();
  if (status.is_ok()) status = decode_attention(problem, CpuExecution{});

  float worst = 0.f;
  for (const float x : out) worst = std::fmax(worst, std::fabs(x - 0.5f));
  std::printf("%s: length %d, packed %d, worst error %g %s\n", name(cache.format).c_str(), length,
              packed, worst, status.text().c_str());
  return status.is_ok() && length == kTokens && packed == 128 && worst < 1e-3f ? 0 : 1;
}
