// SPDX-License-Identifier: Apache-2.0
// A cache with its memory, for tests: pages in shuffled order, everything unused full of NaN; and
// keys and values of any element type and stride order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/format/float16.hpp"
#include "bitdecoding/quantize/append_problem.hpp"

namespace bitdecoding::test {

struct alignas(16) Piece {
  std::uint8_t bytes[16];
  friend bool operator==(const Piece& a, const Piece& b) {
    return std::memcmp(a.bytes, b.bytes, sizeof a.bytes) == 0;
  }
};

inline constexpr Piece kNaNs = [] {
  Piece piece{};
  for (auto& byte : piece.bytes) byte = 0xff;  // NaN as fp16, bf16 and fp32
  return piece;
}();

struct CacheShape {
  int batch = 1;
  int heads = 1;
  int max_tokens = 512;
  int keep_first = 16;
  int keep_last = 64;
  int max_append = 1;
  bool has_mean = false;
};

struct CacheBox {
  CacheBox(const KvFormat& format, const CacheShape& shape, unsigned seed = 1) {
    cache.format = format;
    cache.keep_first = shape.keep_first;
    cache.keep_last = shape.keep_last;
    cache.batch = shape.batch;
    cache.num_kv_heads = shape.heads;
    cache.max_pages = shape.max_tokens / format.page_tokens + 1;
    cache.num_pages = shape.batch * cache.max_pages + 3;
    cache.num_slots = shape.batch + 2;
    cache.tail_tokens = min_tail_tokens(shape.keep_last, format.page_tokens, shape.max_append);
    pool.assign(cache.page_offset(cache.num_pages, 0) / sizeof(Piece), kNaNs);
    side.assign(cache.side_offset(cache.num_slots, 0, 0) * 2 / sizeof(Piece), kNaNs);
    std::mt19937 random(seed);
    block_table.resize(static_cast<std::size_t>(cache.num_pages));
    std::iota(block_table.begin(), block_table.end(), 0);
    std::shuffle(block_table.begin(), block_table.end(), random);
    slots.resize(static_cast<std::size_t>(cache.num_slots));
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), random);
    lengths.assign(static_cast<std::size_t>(shape.batch), 0);
    packed = lengths;
    if (shape.has_mean) {
      std::normal_distribution<float> normal(0.f, 3.f);
      mean.resize(static_cast<std::size_t>(shape.heads * format.head_dim) * 2 / sizeof(Piece));
      auto* bits = reinterpret_cast<std::uint16_t*>(mean.data());
      for (int i = 0; i < shape.heads * format.head_dim; ++i) {
        bits[i] = format::fp16_from_float(normal(random));
      }
    }
  }

  PagedKvCache view() {
    PagedKvCache c = cache;
    c.pool = reinterpret_cast<std::uint8_t*>(pool.data());
    c.side = reinterpret_cast<std::uint16_t*>(side.data());
    c.block_table = block_table.data();
    c.slots = slots.data();
    c.lengths = lengths.data();
    c.packed = packed.data();
    if (!mean.empty()) c.k_mean = reinterpret_cast<const std::uint16_t*>(mean.data());
    return c;
  }
  // K's mean of a head (D); empty without one.
  std::vector<float> mean_of(int head) const {
    std::vector<float> of_head;
    if (mean.empty()) return of_head;
    const auto* bits = reinterpret_cast<const std::uint16_t*>(mean.data());
    for (int c = 0; c < cache.format.head_dim; ++c) {
      of_head.push_back(format::float_from_fp16(bits[head * cache.format.head_dim + c]));
    }
    return of_head;
  }

  friend bool operator==(const CacheBox& a, const CacheBox& b) {
    return a.pool == b.pool && a.side == b.side && a.lengths == b.lengths && a.packed == b.packed;
  }

  // Everything that attention doesn't read becomes NaN.
  void poison_unused() {
    const PagedKvCache c = view();
    std::vector<std::uint8_t> used(pool.size() * sizeof(Piece));
    std::vector<std::uint8_t> live(side.size() * 8);
    for (int b = 0; b < c.batch; ++b) {
      for (int head = 0; head < c.num_kv_heads; ++head) {
        for (int i = 0; i < c.packed[b] / c.format.page_tokens; ++i) {
          const std::size_t at = c.page_offset(c.block_table[b * c.max_pages + i], head);
          std::fill_n(used.begin() + static_cast<std::ptrdiff_t>(at), page_bytes(c.format), 1);
        }
        for (int tensor = 0; tensor < 2; ++tensor) {
          const auto mark = [&](int row) {
            const std::size_t first = c.side_offset(c.slots[b], head, tensor) +
                                      static_cast<std::size_t>(row * c.format.head_dim);
            std::fill_n(live.begin() + static_cast<std::ptrdiff_t>(first), c.format.head_dim, 1);
          };
          for (int n = 0; n < std::min(c.keep_first, c.packed[b]); ++n) mark(c.first_row(n));
          for (int n = c.packed[b]; n < c.lengths[b]; ++n) mark(c.tail_row(n));
        }
      }
    }
    for (std::size_t i = 0; i < used.size(); ++i) {
      if (used[i] == 0) c.pool[i] = 0xff;
    }
    for (std::size_t i = 0; i < live.size(); ++i) {
      if (live[i] == 0) c.side[i] = 0xffff;
    }
  }

  PagedKvCache cache;  // without pointers
  std::vector<Piece> pool, side;
  std::vector<Piece> mean;  // of K, fp16 [H,D]; empty: none
  std::vector<std::int32_t> block_table, slots, lengths, packed;
};

// (B, S, H, D), stored as any type, token-major or head-major, with a gap behind every row.
class TokenArray {
 public:
  TokenArray(ElementType type, int batch, int tokens, int heads, int head_dim, bool head_major)
      : type_(type), row_(head_dim + 8) {
    const std::int64_t outer = std::int64_t{row_} * tokens * heads;
    rows_.type = type;
    rows_.batch_stride = outer + 16;
    rows_.token_stride = head_major ? row_ : std::int64_t{row_} * heads;
    rows_.head_stride = head_major ? std::int64_t{row_} * tokens : row_;
    bytes_.assign(static_cast<std::size_t>(rows_.batch_stride * batch * element_bytes(type)), 0xff);
  }

  void set(int b, int token, int head, int channel, float value) {
    const std::int64_t at = rows_.offset(b, token, head) + channel;
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint16_t half = type_ == ElementType::f16 ? format::fp16_from_float(value)
                                                         : static_cast<std::uint16_t>(bits >> 16);
    std::uint8_t* to = bytes_.data() + at * element_bytes(type_);
    type_ == ElementType::f32 ? std::memcpy(to, &bits, 4) : std::memcpy(to, &half, 2);
  }
  float get(int b, int token, int head, int channel) const {
    const std::int64_t at = rows_.offset(b, token, head) + channel;
    const std::uint8_t* from = bytes_.data() + at * element_bytes(type_);
    std::uint32_t bits = 0;
    std::memcpy(&bits, from, static_cast<std::size_t>(element_bytes(type_)));
    const auto half = static_cast<std::uint16_t>(bits);
    if (type_ == ElementType::f16) return format::float_from_fp16(half);
    return type_ == ElementType::bf16 ? format::float_from_bf16(half) : std::bit_cast<float>(bits);
  }
  TokenRows rows() const {
    TokenRows rows = rows_;
    rows.data = bytes_.data();
    return rows;
  }

 private:
  ElementType type_;
  int row_;
  TokenRows rows_;
  std::vector<std::uint8_t> bytes_;
};

// Normal numbers out of a table: the tests draw a hundred million of them.
class NormalSource {
 public:
  explicit NormalSource(unsigned seed) : state_(seed) {}
  float operator()() {
    static const std::vector<float> table = [] {
      std::mt19937 random(1);
      std::normal_distribution<float> normal;
      std::vector<float> values(1 << 14);
      for (float& value : values) value = normal(random);
      return values;
    }();
    state_ = state_ * 1664525u + 1013904223u;
    return table[state_ >> 18];
  }

 private:
  std::uint32_t state_;
};

// Keys with channels of other sizes and offsets, a few tokens that stand out.
inline void fill_random(TokenArray& array, int batch, int tokens, int heads, int head_dim,
                        unsigned seed, float spread = 1.f) {
  NormalSource normal(seed);
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < heads; ++h) {
      for (int c = 0; c < head_dim; ++c) {
        const float factor = c % 17 == 3 ? 4.f * spread : spread;
        const float offset = c % 13 == 5 ? 3.f : 0.1f * normal();
        for (int n = 0; n < tokens; ++n) {
          const float value = factor * (normal() + offset);
          array.set(b, n, h, c, n < 4 ? 2.f * value : value);
        }
      }
    }
  }
}

}  // namespace bitdecoding::test
