// SPDX-License-Identifier: Apache-2.0
// The CUDA pack writes the bytes of the CPU pack: every legal format, fp16 and bf16, all families
// of values, ragged and padded rows, shuffled pages; nothing outside the pages it was given.
#include <doctest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "bitdecoding/run.hpp"
#include "built_formats.hpp"
#include "device_array.hpp"
#include "pack_case.hpp"

namespace bitdecoding::test {
namespace {

struct DeviceResult {
  std::vector<std::uint8_t> pool;
  std::vector<int> error_word;
};

DeviceResult pack_on_device(const PackCase& c) {
  const DeviceArray k(c.k), v(c.v);
  const DeviceArray leftpad(c.leftpad), num_tokens(c.num_tokens), first_page(c.first_page);
  const DeviceArray block_table(c.block_table);
  const DeviceArray k_mean(c.k_mean);
  const DeviceArray pool(c.pool);
  const DeviceArray error_word(std::vector<int>(4, 0));
  const Status status =
      pack_pages(c.with(k.data(), v.data(), leftpad.data(), num_tokens.data(), first_page.data(),
                        block_table.data(), k_mean.data(), pool.data()),
                 CudaExecution{.error_word = error_word.data()});
  REQUIRE_MESSAGE(status.is_ok(), status.text());
  return {pool.host(), error_word.host()};
}

}  // namespace

TEST_CASE("bytes equal the CPU's for every legal format that has kernels") {
  unsigned seed = std::random_device{}();
  MESSAGE("first seed ", seed, ", formats ", built_formats().size());
  for (const KvFormat& f : built_formats()) {
    ++seed;
    const Family family = Family(seed % (unsigned(Family::last) + 1));
    const ElementType type = seed / 6 % 2 == 0 ? ElementType::f16 : ElementType::bf16;
    const int keep_first = seed / 12 % 2 == 0 ? 16 : 0;
    const PackCase c(f, family, type, keep_first, seed);
    const DeviceResult device = pack_on_device(c);
    const std::vector<std::uint8_t> cpu = pack_on_cpu(c);
    const auto differ = std::mismatch(cpu.begin(), cpu.end(), device.pool.begin());
    CHECK_MESSAGE(differ.first == cpu.end(), name(f), " seed ", seed, ": first different byte ",
                  (differ.first - cpu.begin()) % page_bytes(f), " of its record");
    CHECK(device.error_word[0] == 0);
  }
}

TEST_CASE("every family of values, both element types, with and without first tokens") {
  for (const bool norm : {false, true}) {
    for (const KAxis axis : {KAxis::channel, KAxis::token, KAxis::block}) {
      const int group = axis == KAxis::block ? 32 : 64;
      const KvFormat f{.k_axis = axis, .k_group = group, .v_group = group, .token_norm = norm};
      if (!format::is_valid(f)) continue;  // blocks with norms
      for (int family = 0; family <= int(Family::last); ++family) {
        for (const ElementType type : {ElementType::f16, ElementType::bf16}) {
          for (const int keep_first : {0, 16, 100, 128}) {
            const PackCase c(f, Family(family), type, keep_first, 7u * unsigned(family) + 1u);
            CAPTURE(name(f));
            CAPTURE(family);
            CAPTURE(keep_first);
            CHECK(pack_on_device(c).pool == pack_on_cpu(c));
          }
        }
      }
    }
  }
}

TEST_CASE("a page id outside the pool is skipped and reported, the other pages are right") {
  const KvFormat f;
  PackCase c(f, Family::normal, ElementType::f16, 16, 1);
  const std::vector<std::uint8_t> expected = pack_on_cpu(c);
  const int skipped = c.block_table[1];
  c.block_table[1] = c.problem.num_pages;  // row 0, its second page
  const DeviceResult device = pack_on_device(c);
  CHECK(device.error_word ==
        std::vector<int>{1, c.problem.num_pages, c.problem.num_pages, int(DeviceError::page_id)});
  const std::size_t bytes = std::size_t(kHeads) * page_bytes(f);
  std::vector<std::uint8_t> others = expected;
  std::fill_n(others.begin() + std::ptrdiff_t(skipped * bytes), bytes, kPoison);
  CHECK(device.pool == others);
}

TEST_CASE("a run outside its row writes nothing of the sequence and is reported") {
  PackCase c({}, Family::normal, ElementType::f16, 16, 2);
  PackCase without = c;
  without.num_tokens[3] = 0;
  c.num_tokens[3] = kRowTokens + 1;
  const DeviceResult device = pack_on_device(c);
  CHECK(device.error_word ==
        std::vector<int>{4, kRowTokens + 1, kRowTokens, int(DeviceError::run)});
  CHECK(device.pool == pack_on_cpu(without));
}

TEST_CASE("what the host can see is refused before anything is launched") {
  const PackCase c({}, Family::normal, ElementType::f16, 0, 3);
  PackProblem p = c.with(c.k.data(), c.v.data(), nullptr, nullptr, nullptr, c.block_table.data(),
                         nullptr, const_cast<std::uint8_t*>(c.pool.data()));
  p.k.type = ElementType::f32;
  CHECK(pack_pages(p, CudaExecution{}).text() ==
        "k dtype = float32; allowed on a CUDA device: float16, bfloat16");
  p.k.type = ElementType::f16;
  p.v.token_stride += 1;
  const std::string text = pack_pages(p, CudaExecution{}).text();
  CHECK(text.find("v stride = " + std::to_string(p.v.token_stride)) == 0);
}

}  // namespace bitdecoding::test
