// SPDX-License-Identifier: Apache-2.0
// Caches that decode takes turns through, so that every call finds its bytes in cold memory.
#pragma once

#include <cmath>
#include <numeric>
#include <random>

#include "bitdecoding/format/float16.hpp"
#include "bitdecoding/run.hpp"
#include "decode_case.hpp"
#include "device_memory.hpp"

namespace bitdecoding::bench {

inline constexpr int kTemplatePages = 16;  // pages that are packed; the pool repeats them

inline std::vector<std::uint16_t> random_fp16(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> values(count);
  for (auto& value : values) value = format::fp16_from_float(normal(random));
  return values;
}

inline std::vector<std::int32_t> shuffled(std::size_t count) {
  std::vector<std::int32_t> ids(count);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
  return ids;
}

// Pages [kTemplatePages, H, page_bytes] of real codes and parameters.
inline std::vector<std::uint8_t> packed_pages(const KvFormat& format, int heads) {
  const int tokens = kTemplatePages * format.page_tokens;
  const std::size_t row = static_cast<std::size_t>(heads) * format.head_dim;
  const auto k = random_fp16(tokens * row, 2), v = random_fp16(tokens * row, 3);  // (S, H, D)
  std::vector<std::uint8_t> memory(std::size_t{kTemplatePages} * heads * page_bytes(format) + 16);
  std::uint8_t* pool = memory.data() + (16 - reinterpret_cast<std::uintptr_t>(memory.data()) % 16);
  std::vector<std::int32_t> table(kTemplatePages);
  std::iota(table.begin(), table.end(), 0);
  PackProblem p;
  p.format = format;
  p.num_kv_heads = heads;
  p.k = {k.data(), ElementType::f16, 0, static_cast<std::int64_t>(row), format.head_dim};
  p.v = p.k;
  p.v.data = v.data();
  p.runs = {.batch = 1, .row_tokens = tokens};
  p.pool = pool;
  p.num_pages = p.max_pages = kTemplatePages;
  p.block_table = table.data();
  check(pack_pages(p, CpuExecution{}));
  return {pool, pool + memory.size() - 16};
}

inline PagedKvCache shape_of(const Case& c, const Request& r, int copies) {
  PagedKvCache cache{.format = r.format, .keep_first = r.keep_first, .keep_last = r.keep_last};
  cache.batch = c.batch;
  cache.num_kv_heads = c.heads_kv;
  cache.tail_tokens = min_tail_tokens(r.keep_last, r.format.page_tokens, 1);
  cache.max_pages =
      packed_tokens(c.length, r.keep_last, r.format.page_tokens, 0) / r.format.page_tokens;
  cache.num_pages = copies * c.batch * cache.max_pages;
  cache.num_slots = copies * c.batch;
  return cache;
}

// Caches of the same shape in different memory. Every sequence has pages and a slot of its own, in
// random order, in one pool and one side buffer. Queries and outputs are the same for all.
class ColdCaches {
 public:
  ColdCaches(const Case& c, const Request& r, int copies)
      : shape_(shape_of(c, r, copies)),
        pool_(std::span<const std::uint8_t>(packed_pages(r.format, c.heads_kv)),
              shape_.page_offset(shape_.num_pages, 0)),
        side_(std::span<const std::uint16_t>(random_fp16(1 << 20, 4)),
              2 * shape_.side_offset(shape_.num_slots, 0, 0)),
        block_table_(shuffled(static_cast<std::size_t>(shape_.num_pages))),
        slots_(shuffled(static_cast<std::size_t>(shape_.num_slots))),
        lengths_(std::vector<std::int32_t>(c.batch, c.length)),
        packed_(std::vector<std::int32_t>(c.batch, shape_.max_pages * r.format.page_tokens)),
        q_(random_fp16(query_bytes(c, r.format.head_dim) / 4, 5)),
        out_(q_.bytes()),
        query_heads_(c.heads_kv * c.group) {}

  DecodeProblem problem(int copy) const {
    DecodeProblem p{.cache = shape_, .query_heads = query_heads_};
    p.cache.pool = pool_.at<std::uint8_t>(0);
    p.cache.side = side_.at<std::uint16_t>(0);
    const std::size_t first = static_cast<std::size_t>(copy) * shape_.batch;  // sequence
    p.cache.block_table = block_table_.at<std::int32_t>(first * shape_.max_pages);
    p.cache.slots = slots_.at<std::int32_t>(first);
    p.cache.lengths = lengths_.at<std::int32_t>(0);
    p.cache.packed = packed_.at<std::int32_t>(0);
    const int head_dim = shape_.format.head_dim;
    p.softmax_scale = 1.f / std::sqrt(static_cast<float>(head_dim));
    p.q = q_.data();
    p.q_batch_stride = p.q_token_stride = std::int64_t{query_heads_} * head_dim;
    p.q_head_stride = head_dim;
    p.out = out_.data();
    return p;
  }

  void poison() { check(cudaMemset(out_.data(), 0xff, out_.bytes()), "cudaMemset"); }

  // Every output was written, and is finite.
  void verify() const {
    std::vector<std::uint16_t> out(out_.bytes() / 2);
    check(cudaMemcpy(out.data(), out_.data(), out_.bytes(), cudaMemcpyDeviceToHost), "decode");
    for (const std::uint16_t value : out) {
      if ((value & 0x7c00) == 0x7c00) throw std::runtime_error("the output is not finite");
    }
  }

 private:
  PagedKvCache shape_;
  DeviceMemory pool_, side_, block_table_, slots_, lengths_, packed_, q_, out_;
  int query_heads_;
};

}  // namespace bitdecoding::bench
