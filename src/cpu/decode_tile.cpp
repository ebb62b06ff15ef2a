// SPDX-License-Identifier: Apache-2.0
#include "cpu/decode_tile.hpp"

#include <algorithm>
#include <cmath>

#include "bitdecoding/format/quantizer.hpp"

namespace bitdecoding::cpu {
namespace {

const std::uint16_t* fp16_at(const std::uint8_t* page, int offset) {
  return reinterpret_cast<const std::uint16_t*>(page + offset);
}

// Scales and zero-points of a chunk's 64 tokens, in token order, from a group's planes.
void widen_parameters(const KvFormat& f, const std::uint8_t* page, const PageMap::Parameters& at,
                      int bits, float* scales, float* zeros) {
  if (!f.has_blocks()) {
    widen_token_plane(fp16_at(page, at.scales), scales);
    widen_token_plane(fp16_at(page, at.zeros), zeros);
    return;
  }
  std::uint16_t plane[kChunkTokens];
  for (int i = 0; i < kChunkTokens; ++i) {
    plane[i] = format::block_parameters(page[at.scales + i], bits).scale;
  }
  widen_token_plane(plane, scales);
  for (int i = 0; i < kChunkTokens; ++i) zeros[i] = -format::block_middle(bits) * scales[i];
}

}  // namespace

void DecodeTile::set_queries(const float* q, int rows) {
  const KvFormat& f = c_.format;
  const bool per_token = f.k_axis != KAxis::channel;
  rows_ = rows;
  std::copy_n(q, rows * f.head_dim, q_);
  for (int channel = 0; channel < f.head_dim; ++channel) {
    const int lane = lane_order(channel, f.head_dim);
    for (int r = 0; r < rows; ++r) {
      const float value = q[r * f.head_dim + channel];
      q_lane_[r * f.head_dim + lane] = per_token ? value * map_.k_weights[lane] : value;
    }
  }
  std::fill_n(bias_, rows, 0.f);
  for (int group = 0; per_token && group < f.k_groups(); ++group) {
    for (int r = 0; r < rows; ++r) {
      const float* first = q + r * f.head_dim + group * f.k_group;
      q_sums_[group][r] = 0.f;
      for (int c = 0; c < f.k_group; ++c) q_sums_[group][r] += first[c];
    }
  }
  for (int r = 0; r < rows; ++r) softmax_[r] = {};
  std::fill_n(out_, rows * f.head_dim, 0.f);
}

void DecodeTile::attend(const Segment& segment) {
  const int tokens = segment.end - segment.begin;
  const int padded = (tokens + 7) / 8 * 8;
  std::fill_n(sum_, rows_ * c_.format.head_dim, 0.f);
  std::fill_n(zero_sums_, kRowTile * kMaxVGroups, 0.f);
  segment.place == Segment::Place::pages ? score_pages(segment) : score_tail_rows(segment);
  for (int r = 0; r < rows_; ++r) {
    float* scores = scores_ + r * kSegmentTokens;
    std::fill(scores, scores + std::max(0, segment.attended_from - segment.begin), -INFINITY);
    std::fill(scores + tokens, scores + padded, -INFINITY);
  }
  softmax(padded, rows_, scores_, maxima_, sums_);
  segment.place == Segment::Place::pages ? add_pages(segment) : add_tail_rows(segment);
  merge_segment();
}

const std::uint8_t* DecodeTile::page_of(int token) const {
  const std::int64_t column = token / c_.format.page_tokens;
  return c_.pool +
         c_.page_offset(c_.block_table[sequence_ * std::int64_t{c_.max_pages} + column], head_);
}

// ---- packed pages ----

void DecodeTile::score_pages(const Segment& segment) {
  for (int token = segment.begin; token < segment.end; token += kChunkTokens) {
    score_chunk(page_of(token), token % c_.format.page_tokens / kChunkTokens,
                token == segment.begin, scores_ + (token - segment.begin));
  }
}

// `first`: no parameters of an earlier chunk's group are at hand.
void DecodeTile::score_chunk(const std::uint8_t* page, int chunk, bool first, float* scores) {
  const KvFormat& f = c_.format;
  KeyCodes codes{page + map_.k_codes[chunk], f.k_bits, f.head_dim, 4, 0, f.head_dim};
  float factors[kChunkTokens];
  if (f.k_axis == KAxis::channel) {
    const int step = std::min(f.k_group, kChunkTokens);
    codes.blocks = step / 16;
    for (int n = 0; n < kChunkTokens; n += step) {
      const int in_page = chunk * kChunkTokens + n;
      if (first || in_page % f.k_group == 0) {
        const PageMap::Parameters& at = map_.k_channels[in_page / PageMap::kRunTokens];
        fold_channel_group(q_lane_, map_.k_weights, fp16_at(page, at.scales),
                           fp16_at(page, at.zeros), f.head_dim, rows_, q_scaled_, bias_);
      }
      codes.codes = page + map_.k_codes[chunk] + n * f.head_dim * f.k_bits / 8;
      score_codes(codes, q_scaled_, bias_, rows_, scores + n);
    }
  } else {
    float zeros[kChunkTokens];
    for (int r = 0; r < rows_; ++r) std::fill_n(scores + r * kSegmentTokens, kChunkTokens, 0.f);
    codes.channels = f.k_group;
    for (int group = 0; group < f.k_groups(); ++group) {
      widen_parameters(f, page, map_.k_tokens[chunk][group], f.k_bits, factors, zeros);
      codes.first_channel = group * f.k_group;
      score_codes(codes, q_lane_, bias_, rows_, partial_);
      add_token_group(partial_, factors, zeros, q_sums_[group], rows_, scores);
    }
  }
  if (f.token_norm) {
    widen_token_plane(fp16_at(page, map_.norms[chunk]), factors);
    multiply_scores(factors, rows_, scores);
  }
}

void DecodeTile::add_pages(const Segment& segment) {
  const KvFormat& f = c_.format;
  float scales[kChunkTokens];
  float zeros[kChunkTokens];
  for (int token = segment.begin; token < segment.end; token += kChunkTokens) {
    const std::uint8_t* page = page_of(token);
    const int chunk = token % f.page_tokens / kChunkTokens;
    for (int group = 0; group < f.v_groups(); ++group) {
      widen_parameters(f, page, map_.v_tokens[chunk][group], f.v_bits, scales, zeros);
      scale_probabilities(scores_ + (token - segment.begin), scales, zeros,
                          segment.attended_from - token, rows_, p_scaled_, zero_sums_ + group);
      add_codes({page + map_.v_codes[chunk], f.v_bits, f.head_dim, group * f.v_group, f.v_group},
                p_scaled_, rows_, sum_);
    }
  }
  finish_codes(map_.v_weights, zero_sums_, f.head_dim, f.v_group, rows_, sum_);
}

// ---- fp16 rows ----

// visit(rows, first token of the segment, tokens) for each contiguous run of rows.
template <class Visit>
void DecodeTile::for_row_runs(const Segment& segment, int tensor, const Visit& visit) const {
  const std::uint16_t* rows = c_.side + c_.side_offset(c_.slots[sequence_], head_, tensor);
  for (int position = segment.begin; position < segment.end;) {
    const bool tail = segment.place == Segment::Place::tail;
    const int row = tail ? c_.tail_row(position) : c_.first_row(position);
    const int left = segment.end - position;
    const int count = tail ? std::min(left, c_.keep_first + c_.tail_tokens - row) : left;
    visit(rows + static_cast<std::ptrdiff_t>(row) * c_.format.head_dim, position - segment.begin,
          count);
    position += count;
  }
}

void DecodeTile::score_tail_rows(const Segment& segment) {
  for_row_runs(segment, 0, [this](const std::uint16_t* k, int first, int count) {
    score_rows(k, c_.format.head_dim, count, q_, rows_, scores_ + first);
  });
}

void DecodeTile::add_tail_rows(const Segment& segment) {
  for_row_runs(segment, 1, [this](const std::uint16_t* v, int first, int count) {
    add_rows(v, c_.format.head_dim, count, scores_ + first, rows_, sum_);
  });
}

void DecodeTile::merge_segment() {
  const int head_dim = c_.format.head_dim;
  for (int r = 0; r < rows_; ++r) {
    const float maximum = std::max(softmax_[r].maximum, maxima_[r]);
    const float old_weight = std::exp2(softmax_[r].maximum - maximum);
    const float new_weight = std::exp2(maxima_[r] - maximum);
    softmax_[r] = {maximum, softmax_[r].sum * old_weight + sums_[r] * new_weight};
    for (int c = r * head_dim; c < (r + 1) * head_dim; ++c) {
      out_[c] = out_[c] * old_weight + sum_[c] * new_weight;
    }
  }
}

}  // namespace bitdecoding::cpu
