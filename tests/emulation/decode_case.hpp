// SPDX-License-Identifier: Apache-2.0
// Random decode problems: a ragged cache that the CPU backend has filled, queries, how the kernel
// is launched, and what may be wrong with sequences.
#pragma once

#include <doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <span>
#include <vector>

#include "bitdecoding/decode/choice.hpp"
#include "bitdecoding/decode/decode_plan.hpp"
#include "bitdecoding/run.hpp"
#include "cpu/cache_box.hpp"
#include "legal_formats.hpp"
#include "machine.hpp"
#include "page_reader.hpp"
#include "value_families.hpp"

namespace bitdecoding::test {

class Draw {
 public:
  explicit Draw(std::seed_seq seed) : random(seed) {}

  int between(int first, int last) {
    return first + static_cast<int>(random() % static_cast<unsigned>(last - first + 1));
  }
  bool one_in(int count) { return between(1, count) == 1; }
  template <class List>
  auto one_of(const List& list) {
    return *(std::begin(list) + between(0, static_cast<int>(std::size(list)) - 1));
  }

  std::mt19937 random;
};

inline float widen(std::uint16_t bits, ElementType type) {
  return type == ElementType::f16 ? format::float_from_fp16(bits) : format::float_from_bf16(bits);
}

// The batches that must occur, whatever the seed. Lanes look at 32 sequences at a time.
enum class Batch {
  one_long,
  one_for_many_ctas,
  two_for_many_ctas,
  few,
  more_than_lanes,
  more_than_lanes_squared
};

struct DecodeCase {
  KvFormat format;
  CacheShape shape;
  std::vector<std::int32_t> lengths;
  int group = 1;  // query heads per KV head
  int query_tokens = 1;
  ElementType type = ElementType::f16;  // of q and out
  bool in_steps = true;                 // see fill_steps
  int faults = 0;
  int ctas = 1, warps = 4, stages = 2, packed_chunks = 1;
  int late_ctas = 1;  // one launch without, and one each in which one of these CTAs comes last
};

inline std::vector<std::int32_t> draw_lengths(Batch batch, Draw& draw) {
  std::vector<std::int32_t> lengths;
  const auto add = [&](int count, const auto& length) {
    for (int i = 0; i < count; ++i) lengths.push_back(length());
  };
  switch (batch) {
    case Batch::one_long:
    case Batch::one_for_many_ctas: add(1, [&] { return draw.between(1500, 4500); }); break;
    case Batch::two_for_many_ctas: add(2, [&] { return draw.between(600, 1000); }); break;
    case Batch::few:
      add(draw.between(2, 8), [&] { return draw.between(0, draw.one_in(3) ? 3 : 700); });
      break;
    case Batch::more_than_lanes:
      add(draw.between(33, 64), [&] { return draw.one_in(3) ? 0 : draw.between(1, 200); });
      break;
    case Batch::more_than_lanes_squared:
      add(draw.between(1025, 1100), [&] { return draw.one_in(8) ? draw.between(1, 80) : 0; });
      break;
  }
  lengths[draw.random() % lengths.size()] += 1;  // not all are empty
  return lengths;
}

inline KvFormat draw_format(const decode::DecodeConfig& config, Draw& draw) {
  std::vector<KvFormat> formats = legal_formats();
  // Kernels have code of their own for them, or no other.
  const bool whole_groups =
      config.product() == decode::Product::wgmma || (!config.page.has_blocks() && draw.one_in(2));
  std::erase_if(formats, [&](const KvFormat& f) {
    return !decode::serves(config, f) || decode::has_whole_groups(f) != whole_groups;
  });
  KvFormat f = draw.one_of(formats);
  if (draw.one_in(2)) {
    const KvFormat other = draw.one_of(rotated_formats());
    if (is_legal_rotation(other.k_rotation, f.head_dim)) f.k_rotation = other.k_rotation;
    if (is_legal_rotation(other.v_rotation, f.head_dim)) f.v_rotation = other.v_rotation;
  }
  return f;
}

// Warps of a CTA: streams of one, two or four.
inline int draw_warps(const decode::DecodeConfig& config, int first, Draw& draw) {
  const int of_stream = decode::stream_warps(config);
  return draw.between((first + of_stream - 1) / of_stream, decode::max_warps(config) / of_stream) *
         of_stream;
}

// The grid, and items of pages or chunks.
inline void draw_launch(const decode::DecodeConfig& config, Batch batch, Draw& draw,
                        DecodeCase& c) {
  c.stages = draw.between(2, 4);
  if (batch == Batch::one_for_many_ctas) {  // more partials of a segment than are merged at once
    c.ctas = draw.between(21, 30);
    c.warps = draw.between(1, 2) * decode::stream_warps(config);
  } else if (batch == Batch::two_for_many_ctas) {
    // At head_dim 128, a CTA that has two segments merges four columns at a time, the others one:
    // whichever is last merges a segment's partials, and must come to the same bits.
    c.in_steps = false;  // sums that are rounded
    c.ctas = draw.between(12, 16);
    c.late_ctas = c.ctas;
    c.warps = draw_warps(config, 3, draw);
    c.group = draw.between(c.warps / 2 + 1, c.warps);
  } else if (draw.one_in(2)) {  // only warps that get many chunks take pages
    c.packed_chunks = c.format.chunks();
    c.ctas = draw.between(1, 2);
    c.warps = draw.between(1, 4) * decode::stream_warps(config);
    c.warps = std::min(c.warps, 8);
  } else {
    c.ctas = draw.between(1, 6);
    c.warps = draw.one_in(2) ? 4 : draw_warps(config, 1, draw);
  }
}

inline DecodeCase draw_case(const decode::DecodeConfig& config, Batch batch, Draw& draw) {
  DecodeCase c;
  c.format = draw_format(config, draw);
  c.lengths = draw_lengths(batch, draw);
  c.shape.batch = static_cast<int>(c.lengths.size());
  c.shape.max_tokens = *std::max_element(c.lengths.begin(), c.lengths.end());
  const bool is_huge = batch == Batch::more_than_lanes_squared;  // little memory for each
  c.shape.keep_first = is_huge || draw.one_in(4) ? 0 : draw.between(1, c.format.page_tokens);
  c.shape.keep_last = is_huge ? 0 : draw.between(0, 90);
  c.shape.has_mean = draw.one_in(4);
  const bool is_dealt_out = batch == Batch::one_for_many_ctas || batch == Batch::two_for_many_ctas;
  if (is_huge || is_dealt_out) {  // one segment of a sequence
    c.group = draw.between(1, 8);
  } else {
    c.shape.heads = draw.between(1, 3);
    c.group = draw.between(1, config.product() == decode::Product::wgmma ? 40 : 12);
    if (draw.one_in(3)) c.query_tokens = draw.between(2, 3);
  }
  if (draw.one_in(4)) c.type = ElementType::bf16;
  c.in_steps = !draw.one_in(3);
  if (draw.one_in(3)) c.faults = draw.between(1, 3);
  draw_launch(config, batch, draw, c);
  return c;
}

// Numbers (code + offset) * 2^exponent; any 32 aligned tokens, and any 32 aligned channels, hold
// the smallest and the largest code. The quantiser gives them back as they are, with powers of two
// as scales: products with them are exact in fp16.
template <class Exponent>
void fill_steps(TokenArray& array, const DecodeCase& c, int bits, Draw& draw,
                const Exponent& exponent) {
  const int top = (1 << bits) - 1;
  for (int b = 0; b < c.shape.batch; ++b) {
    const auto offset = static_cast<float>(draw.between(-8, 8));
    for (int token = 0; token < c.lengths[b]; ++token) {
      for (int head = 0; head < c.shape.heads; ++head) {
        for (int channel = 0; channel < c.format.head_dim; ++channel) {
          const int place = (token + channel) % 32;
          const int code = place < 2 ? place * top : draw.between(0, top);
          array.set(b, token, head, channel,
                    std::ldexp(static_cast<float>(code) + offset, exponent(b, token, channel)));
        }
      }
    }
  }
}

// Every sequence and head from one of the families.
inline void fill_families(TokenArray& array, const DecodeCase& c, std::span<const Family> families,
                          Draw& draw) {
  for (int b = 0; b < c.shape.batch; ++b) {
    for (int head = 0; head < c.shape.heads; ++head) {
      ValueSource source(draw.one_of(families), static_cast<std::uint32_t>(draw.random()));
      for (int token = 0; token < c.lengths[b]; ++token) {
        for (int channel = 0; channel < c.format.head_dim; ++channel) {
          array.set(b, token, head, channel, format::float_from_fp16(source.next()));
        }
      }
    }
  }
}

inline float largest_magnitude(const TokenArray& array, const DecodeCase& c, int sequence) {
  float largest = 0.f;
  for (int token = 0; token < c.lengths[sequence]; ++token) {
    for (int head = 0; head < c.shape.heads; ++head) {
      for (int channel = 0; channel < c.format.head_dim; ++channel) {
        largest = std::max(largest, std::abs(array.get(sequence, token, head, channel)));
      }
    }
  }
  return largest;
}

// What the largest of values may be read as: no value of a block is less than 2^-15, or more than
// 1.1 times as large as the block's largest was (5.5 for all above 5).
inline float largest_read(const KvFormat& f, float largest) {
  return f.has_blocks() ? std::max(1.1f * largest, 0x1p-15f) : largest;
}

// A filled cache, and queries with gaps between heads.
class DecodeInputs {
 public:
  DecodeInputs(const DecodeCase& c, Draw& draw)
      : box(c.format, c.shape, static_cast<unsigned>(draw.random())) {
    const float largest_key = append(c, draw);
    const int d = c.format.head_dim;
    problem.cache = box.view();
    problem.query_tokens = c.query_tokens;
    problem.query_heads = c.shape.heads * c.group;
    problem.type = c.type;
    problem.q_head_stride = d + 2 * draw.between(0, 1);
    problem.q_token_stride = problem.q_head_stride * problem.query_heads;
    problem.q_batch_stride = problem.q_token_stride * c.query_tokens;
    // Scores of about 1: with larger ones a single token would be the whole result. (Smaller keys
    // would make that a matter of Q' * scale among fp16's subnormal numbers.)
    problem.softmax_scale = (draw.one_in(2) ? 4.f : -4.f) /
                            (std::sqrt(static_cast<float>(d)) * std::max(largest_key, 0x1p-4f));
    NormalSource normal(static_cast<unsigned>(draw.random()));
    const auto gap = static_cast<std::size_t>(problem.q_head_stride - d);
    q.resize(static_cast<std::size_t>(problem.q_batch_stride * c.shape.batch) - gap);
    for (std::uint16_t& x : q) {
      const float value = normal();
      x = c.type == ElementType::f16 ? format::fp16_from_float(value)
                                     : format::bf16_from_float(value);
    }
    constexpr std::uint16_t kNan = 0xffff;  // fp16 and bf16
    if (draw.one_in(3)) q[draw.between(0, static_cast<int>(q.size()) - 1)] = kNan;
  }

  float query(int sequence, int token, int head, int channel) const {
    return widen(q[sequence * problem.q_batch_stride + token * problem.q_token_stride +
                   head * problem.q_head_stride + channel],
                 problem.type);
  }
  std::size_t rows() const {
    return static_cast<std::size_t>(problem.cache.batch) * problem.query_tokens *
           problem.query_heads;
  }

  CacheBox box;
  std::vector<std::uint16_t> q;      // (B,Sq,Hq,D)
  DecodeProblem problem;             // on the host, without q, out and lse
  std::vector<float> largest_value;  // |v| of each sequence

 private:
  // Returns the largest |k|, or that of their mean.
  float append(const DecodeCase& c, Draw& draw) {
    TokenArray k(ElementType::f32, c.shape.batch, c.shape.max_tokens, c.shape.heads,
                 c.format.head_dim, draw.one_in(2));
    TokenArray v = k;
    if (c.in_steps) {
      const int key_exponent = draw.between(-6, 9), value_exponent = draw.between(-8, 5);
      fill_steps(k, c, c.format.k_bits, draw,
                 [&](int, int, int channel) { return key_exponent + channel % 5 - 2; });
      fill_steps(v, c, c.format.v_bits, draw,
                 [&](int b, int token, int) { return value_exponent + (3 * b + token) % 9 - 6; });
    } else {
      const Family of_keys[] = {draw.one_of(kFamilies)};
      fill_families(k, c, of_keys, draw);
      fill_families(v, c, kFamilies, draw);
    }
    const AppendProblem append{box.view(),
                               k.rows(),
                               v.rows(),
                               {c.shape.batch, c.shape.max_tokens, nullptr, c.lengths.data()}};
    const Status status = append_tokens(append, CpuExecution{1});
    REQUIRE_MESSAGE(status.is_ok(), status.text());
    box.poison_unused();
    float largest_key = 0.f;
    for (int head = 0; head < c.shape.heads; ++head) {
      for (const float x : box.mean_of(head)) largest_key = std::max(largest_key, std::abs(x));
    }
    for (int b = 0; b < c.shape.batch; ++b) {
      largest_key = std::max(largest_key, largest_magnitude(k, c, b));
      largest_value.push_back(largest_read(c.format, largest_magnitude(v, c, b)));
    }
    return largest_key;
  }
};

// In some sequences one attended token's values of a group become NaN, as if one had been.
inline void spoil_values(CacheBox& box, const DecodeCase& decode_case, Draw& draw) {
  const PagedKvCache c = box.view();
  for (int b = 0; b < c.batch; ++b) {
    // All query tokens attend to these.
    const int end = std::min(c.packed[b], c.lengths[b] - decode_case.query_tokens);
    if (end <= c.keep_first || !draw.one_in(4)) continue;
    const int position = draw.between(c.keep_first, end - 1);
    const int token = position % c.format.page_tokens;
    const int id = c.block_table[b * c.max_pages + position / c.format.page_tokens];
    std::uint8_t* bytes = c.pool + c.page_offset(id, draw.between(0, c.num_kv_heads - 1));
    const PageReader page{c.format, bytes};
    const int channel = 32 * draw.between(0, c.format.head_dim / 32 - 1);
    if (page.blocks()) {
      bytes[page.v_exponent(token, channel)] = 31;
      continue;
    }
    for (const int offset : {page.v_scale(token, channel), page.v_zero(token, channel)}) {
      std::memcpy(bytes + offset, &format::kFp16NaN, sizeof format::kFp16NaN);
    }
  }
}

// What belongs to a masked token alone becomes NaN or infinite: its parameters, in pages that are
// attended behind keep_first.
inline void poison_masked(CacheBox& box, Draw& draw) {
  const PagedKvCache c = box.view();
  for (int b = 0; b < c.batch; ++b) {
    for (int token = 0; token < std::min(c.keep_first, c.packed[b]); ++token) {
      for (int head = 0; head < c.num_kv_heads; ++head) {
        std::uint8_t* bytes = c.pool + c.page_offset(c.block_table[b * c.max_pages], head);
        const PageReader page{c.format, bytes};
        if (page.blocks()) {
          const int channel = 32 * draw.between(0, c.format.head_dim / 32 - 1);
          bytes[page.v_exponent(token, channel)] = 31;  // NaN
          bytes[page.k_exponent(token, channel)] = 31;
          continue;
        }
        const auto poison = [&](int offset) {
          const std::uint16_t bits = draw.one_in(2) ? 0x7c00 : 0xfe00;  // inf, NaN
          std::memcpy(bytes + offset, &bits, sizeof bits);
        };
        for (int channel = 0; channel < c.format.head_dim; channel += 32) {
          poison(page.v_scale(token, channel));
          poison(page.v_zero(token, channel));
          if (page.per_channel()) continue;
          poison(page.k_scale(token, channel));
          poison(page.k_zero(token, channel));
        }
        if (c.format.token_norm) poison(page.norm(token));
      }
    }
  }
}

// Something that the kernel must find in some sequences; returns which.
inline std::set<int> add_faults(CacheBox& box, int count, Draw& draw) {
  const PagedKvCache c = box.view();
  std::set<int> faulty;
  for (int i = 0; i < count; ++i) {
    const int b = draw.between(0, c.batch - 1);
    const int last_page = c.packed[b] / c.format.page_tokens - 1;
    const bool attends_last_page = (last_page + 1) * c.format.page_tokens > c.keep_first;
    if (!faulty.insert(b).second) continue;
    switch (draw.between(0, last_page >= 0 && attends_last_page ? 3 : 2)) {
      case 0: box.slots[b] = draw.one_in(2) ? -1 : c.num_slots; break;
      case 1: box.lengths[b] = draw.one_in(2) ? -5 : c.packed[b] + c.tail_tokens + 1; break;
      case 2: box.packed[b] += 1; break;
      default:
        box.block_table[b * c.max_pages + last_page] = draw.one_in(2) ? -1 : c.num_pages;
        break;
    }
  }
  return faulty;
}

}  // namespace bitdecoding::test
