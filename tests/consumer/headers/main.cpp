// SPDX-License-Identifier: Apache-2.0
// A kernel author's view of a page, on a CPU and without the compiled library: writes codes by
// (token, channel) and finds them again, also in the words that the lanes of an MMA read.
#include <bitdecoding/layout/packed_kv_tensor.hpp>
#include <cstdio>
#include <vector>

int main() {
  using namespace bitdecoding;
  constexpr KvFormat format{.k_bits = 4, .v_bits = 2, .k_group = 64};
  static_assert(page_bytes(format) % layout::kRecordAlignment_bytes == 0);

  std::vector<std::uint8_t> bytes(page_bytes(format));
  using Page = layout::PackedKvPage<layout::page_config(format)>;
  const Page page(layout::PageRecord(format), bytes.data());

  auto k = page.k_codes();  // (N,D)
  auto v = page.v_codes();  // (N,D)
  for (int token = 0; token < format.page_tokens; ++token) {
    for (int channel = 0; channel < format.head_dim; ++channel) {
      k(token, channel) = cute::uint4_t((token + 3 * channel) % 16);
      v(token, channel) = cute::uint2_t((token + channel) % 4);
    }
  }
  int wrong = 0;
  for (int token = 0; token < format.page_tokens; ++token) {
    for (int channel = 0; channel < format.head_dim; ++channel) {
      wrong += static_cast<int>(cute::uint4_t(k(token, channel))) != (token + 3 * channel) % 16;
      wrong += static_cast<int>(cute::uint2_t(v(token, channel))) != (token + channel) % 4;
    }
  }
  // docs/format.md: word 0 of the first unit of lane 0 begins with token 0, channel 0.
  const auto units = page.k_units(0);  // (lane,unit,block)
  wrong += (units(0, 0, 0).word[0] & 0xf) != 0;
  std::printf("%s: %d bytes, %d codes wrong\n", name(format).c_str(), page_bytes(format), wrong);
  return wrong != 0;
}
