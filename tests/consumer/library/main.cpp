// SPDX-License-Identifier: Apache-2.0
// A user of the compiled library: appends 300 tokens to a 4-bit cache on the CPU and attends to them.
// Every value is 0.5, which a group of equal values stores exactly, so the answer is 0.5.
#include <bitdecoding/bitdecoding.hpp>
#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  using namespace bitdecoding;
  constexpr int kTokens = 300, kHeads = 2, kQueryHeads = 8, kPages = 3, kKeepFirst = 16, kKeepLast = 64;
  const KvFormat format{.k_bits = 4, .v_bits = 4};
  const int tail = min_tail_tokens(kKeepLast, format.page_tokens, 1);

  struct alignas(128) Line { std::uint8_t bytes[128]; };
  std::vector<Line> pool(kPages * kHeads * page_bytes(format) / sizeof(Line));
  std::vector<Line> side(kHeads * 2 * (kKeepFirst + tail) * format.head_dim * 2 / sizeof(Line));
  const std::vector<std::int32_t> table{2, 0, 1}, slots{0};
  std::int32_t length = 0, packed = 0;
  const PagedKvCache cache{
      .format = format, .keep_first = kKeepFirst, .keep_last = kKeepLast,
      .batch = 1, .num_kv_heads = kHeads, .num_pages = kPages, .num_slots = 1,
      .tail_tokens = tail, .max_pages = kPages,
      .pool = pool.data()->bytes, .side = reinterpret_cast<std::uint16_t*>(side.data()),
      .block_table = table.data(), .slots = slots.data(), .lengths = &length, .packed = &packed};

  std::vector<float> k(kTokens * kHeads * format.head_dim), v(k.size(), 0.5f);  // (1, S, H, D)
  for (std::size_t i = 0; i < k.size(); ++i) k[i] = std::sin(0.1f * static_cast<float>(i));
  const auto rows = [&](const std::vector<float>& x) {
    return TokenRows{.data = x.data(), .type = ElementType::f32, .batch_stride = 0,
                     .token_stride = kHeads * format.head_dim, .head_stride = format.head_dim};
  };
  const TokenRuns runs{.batch = 1, .row_tokens = kTokens};
  Status status = append_tokens({.cache = cache, .k = rows(k), .v = rows(v), .runs = runs}, CpuExecution{});

  std::vector<float> q(kQueryHeads * format.head_dim, 0.1f), out(q.size());  // (1, 1, Hq, D)
  if (status.is_ok()) {
    status = decode_attention({.cache = cache, .query_heads = kQueryHeads, .softmax_scale = 0.09f,
                     .type = ElementType::f32, .q = q.data(), .q_token_stride = std::ssize(q),
                     .q_head_stride = format.head_dim, .out = out.data()}, CpuExecution{});
  }
  float worst = 0.f;
  for (const float x : out) worst = std::fmax(worst, std::fabs(x - 0.5f));
  std::printf("%s: length %d, packed %d, worst error %g%s\n", name(format).c_str(), length, packed,
              worst, status.is_ok() ? "" : status.text().c_str());
  return status.is_ok() && length == kTokens && packed == 128 && worst < 1e-3f ? 0 : 1;
}
