// SPDX-License-Identifier: Apache-2.0
// The pack kernel's device code, run by the CPU: every legal format, both element types and all
// families of values give the bytes of the CPU backend. EMULATION_SEED=<number> draws other cases.
#include "cuda_on_host.hpp"

// Device code comes behind the emulation, where it finds CUDA's names.
#include <doctest.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "bitdecoding/quantize/pack_kernel.cuh"
#include "legal_formats.hpp"
#include "pack_case.hpp"

namespace bitdecoding::test {
namespace {

using emulation::GuardedArray;
using layout::PageConfig;

template <PageConfig Config>
struct Row {
  static constexpr PageConfig config = Config;
};

struct EmulatedResult {
  std::vector<std::uint8_t> pool;
  std::vector<int> error_word;
};

template <PageConfig Config>
EmulatedResult emulate(const PackCase& c, std::mt19937& random) {
  const GuardedArray<std::uint16_t> k(c.k), v(c.v), k_mean(c.k_mean);
  const GuardedArray<std::int32_t> leftpad(c.leftpad), num_tokens(c.num_tokens);
  const GuardedArray<std::int32_t> first_page(c.first_page), block_table(c.block_table);
  const GuardedArray<std::uint8_t> pool(c.pool.size());
  const GuardedArray<int> error_word(4);
  std::ranges::copy(c.pool, pool.begin());
  const PackProblem p = c.with(k.data(), v.data(), leftpad.data(), num_tokens.data(),
                               first_page.data(), block_table.data(), k_mean.data(), pool.data());
  const layout::PageRecord record(p.format);
  // CTAs know nothing of each other: one after the other.
  const int ctas = p.runs.row_tokens / p.format.page_tokens * p.num_kv_heads;
  for (int cta = 0; cta < ctas * p.runs.batch; ++cta) {
    const emulation::Grid grid{1, quantize::kPackThreads,
                               sizeof(quantize::PackStorage<Config.head_dim>), cta % ctas,
                               cta / ctas};
    emulation::Machine machine(grid, emulation::Landing::when_awaited, -1, random);
    machine.run([&](std::uint8_t* shared) {
      quantize::pack_page<Row<Config>>(
          p, record, error_word.data(),
          *reinterpret_cast<quantize::PackStorage<Config.head_dim>*>(shared));
    });
  }
  return {{pool.begin(), pool.end()}, {error_word.begin(), error_word.end()}};
}

// By the kernel of the format's page configuration.
EmulatedResult emulate_any(const PackCase& c, std::mt19937& random) {
  const KvFormat& f = c.problem.format;
  const auto by_axis = [&]<int KBits, int VBits, int HeadDim> {
    if (f.k_axis == KAxis::channel) {
      return emulate<PageConfig{KBits, VBits, KAxis::channel, HeadDim}>(c, random);
    }
    if (f.has_blocks()) {
      return emulate<PageConfig{KBits, VBits, KAxis::block, HeadDim}>(c, random);
    }
    return emulate<PageConfig{KBits, VBits, KAxis::token, HeadDim}>(c, random);
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

void check(const PackCase& c, unsigned seed) {
  CAPTURE(name(c.problem.format));
  CAPTURE(seed);
  std::mt19937 random(seed);
  const EmulatedResult emulated = emulate_any(c, random);
  const std::vector<std::uint8_t> cpu = pack_on_cpu(c);
  const auto differ = std::ranges::mismatch(cpu, emulated.pool).in1 - cpu.begin();
  CHECK_MESSAGE(differ == std::ptrdiff_t(cpu.size()), "first different byte ",
                differ % page_bytes(c.problem.format), " of its record");
  CHECK(emulated.error_word[0] == 0);
}

unsigned first_seed() {
  const char* seed = std::getenv("EMULATION_SEED");
  return seed == nullptr ? 1u : static_cast<unsigned>(std::stoul(seed));
}

}  // namespace

TEST_CASE("bytes equal the CPU backend's for every legal format") {
  unsigned seed = first_seed();
  for (const KvFormat& f : all_formats()) {
    ++seed;
    const Family family = Family(seed % (unsigned(Family::last) + 1));
    const ElementType type = seed / 6 % 2 == 0 ? ElementType::f16 : ElementType::bf16;
    const int keep_first = seed / 12 % 2 == 0 ? 16 : 0;
    check(PackCase(f, family, type, keep_first, seed), seed);
  }
}

TEST_CASE("every family of values, with and without norms and first tokens") {
  unsigned seed = first_seed();
  for (const bool norm : {false, true}) {
    for (int family = 0; family <= int(Family::last); ++family) {
      for (const int keep_first : {0, 100}) {
        const KvFormat f{.k_group = 64, .v_group = 64, .token_norm = norm};
        ++seed;
        check(PackCase(f, Family(family), ElementType::f16, keep_first, seed), seed);
        if (norm) continue;
        const KvFormat blocks{.v_bits = 2, .k_axis = KAxis::block, .k_group = 32, .v_group = 32};
        check(PackCase(blocks, Family(family), ElementType::f16, keep_first, seed), seed);
      }
    }
  }
}

}  // namespace bitdecoding::test
