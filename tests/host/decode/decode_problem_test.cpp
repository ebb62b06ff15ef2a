// SPDX-License-Identifier: Apache-2.0
// What a CUDA decode asks besides what every decode does, as far as the host can see.
#include "bitdecoding/decode/decode_problem.hpp"

#include <doctest.h>

#include <climits>
#include <cstdint>
#include <string>

namespace bitdecoding {
namespace {

template <class Pointer>
Pointer address(std::uintptr_t value) {
  return reinterpret_cast<Pointer>(value);
}

// One KV head with four query heads; nothing is read, so the addresses are made up.
DecodeProblem good_problem() {
  PagedKvCache c;
  c.batch = c.num_kv_heads = c.num_pages = c.num_slots = 1;
  c.max_pages = 8;
  c.tail_tokens = 128;
  c.pool = address<std::uint8_t*>(4096);
  c.side = address<std::uint16_t*>(4096);
  c.block_table = c.slots = address<const std::int32_t*>(4096);
  c.lengths = c.packed = address<std::int32_t*>(4096);
  DecodeProblem p;
  p.cache = c;
  p.query_heads = 4;
  p.softmax_scale = 1.f;
  p.q = address<const void*>(4096);
  p.q_batch_stride = p.q_token_stride = 4 * 128;
  p.q_head_stride = 128;
  p.out = address<void*>(4096);
  return p;
}

std::string text(const DecodeProblem& p) { return validate_for_cuda(p).text(); }

}  // namespace

TEST_CASE("what a launch can't do is refused by name, value and what is allowed") {
  CHECK(text(good_problem()) == "");
  DecodeProblem p = good_problem();
  p.type = ElementType::f32;
  CHECK(text(p) == "q dtype = float32; allowed on a CUDA device: float16, bfloat16");
  p = good_problem();
  p.q = address<const void*>(4098);
  CHECK(text(p) == "q address = 4098; allowed on a CUDA device: multiples of 4");
  p = good_problem();
  p.q_head_stride = 129;
  CHECK(text(p) == "q stride = 129 elements; allowed on a CUDA device: multiples of 2");
  p = good_problem();
  p.out = address<void*>(4100);
  CHECK(text(p) == "out address = 4100; allowed on a CUDA device: multiples of 8");
  p = good_problem();
  p.cache.tail_tokens = 136;
  CHECK(text(p) == "tail_tokens = 136; allowed on a CUDA device: multiples of 16");
}

TEST_CASE("work is counted by KV heads and tiles of 4 columns, not by query heads") {
  DecodeProblem p = good_problem();  // a prompt of 8192 tokens behind 512k tokens, 32 / 8 heads
  p.cache.num_kv_heads = 8;
  p.query_heads = 32;
  p.cache.max_pages = 4095;
  p.query_tokens = 8192;
  CHECK(text(p) == "");
  p.cache.batch = 64;
  CHECK(text(p).starts_with("query_tokens * query_heads / num_kv_heads = 32768 with batch * "));
  p.cache.batch = 1;
  p.query_tokens = INT_MAX;
  CHECK(!validate_for_cuda(p).is_ok());
}

}  // namespace bitdecoding
