// SPDX-License-Identifier: Apache-2.0
// DecodeTile: up to kRowTile query rows of one KV head on their way through segments of a cache.
// Holds the rows' running softmax (maximum, sum, output) and the scratch of one segment.
#pragma once

#include <cstdint>

#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "cpu/code_kernels.hpp"
#include "cpu/page_map.hpp"

namespace bitdecoding::cpu {

// Up to kSegmentTokens attended tokens of one sequence, all in one place.
struct Segment {
  enum class Place { pages, first_rows, tail };
  Place place;
  int begin, end;     // positions
  int attended_from;  // pages: begin is the chunk's start, positions before this one are masked
};

struct SoftmaxRow {
  float maximum = kScoreFloor;  // base 2
  float sum = 0.f;
};

class DecodeTile {
 public:
  DecodeTile(const PagedKvCache& cache, const PageMap& map, int sequence, int head)
      : c_(cache), map_(map), sequence_(sequence), head_(head) {}

  // `q` (rows, D), times softmax scale and log2(e).
  void set_queries(const float* q, int rows);

  void attend(const Segment& segment);

  const SoftmaxRow& row(int r) const { return softmax_[r]; }
  const float* out(int r) const { return out_ + r * c_.format.head_dim; }

 private:
  void score_pages(const Segment& segment);
  void score_chunk(const std::uint8_t* page, int chunk, bool first, float* scores);
  void add_pages(const Segment& segment);
  void score_tail_rows(const Segment& segment);
  void add_tail_rows(const Segment& segment);
  void merge_segment();

  template <class Visit>
  void for_row_runs(const Segment& segment, int tensor, const Visit& visit) const;
  const std::uint8_t* page_of(int token) const;

  const PagedKvCache& c_;
  const PageMap& map_;
  int sequence_;
  int head_;
  int rows_ = 0;

  alignas(64) float q_[kRowTile * kMaxHeadDim];       // channel order
  alignas(64) float q_lane_[kRowTile * kMaxHeadDim];  // lane order; token axis: times weights
  alignas(64) float q_scaled_[kRowTile * kMaxHeadDim];
  float bias_[kRowTile];
  float q_sums_[PageMap::kGroups][kRowTile];  // token axis: sum of a channel group's q

  // One segment.
  alignas(64) float scores_[kRowTile * kSegmentTokens];
  alignas(64) float partial_[kRowTile * kSegmentTokens];
  alignas(64) float p_scaled_[kRowTile * kChunkTokens];
  alignas(64) float sum_[kRowTile * kMaxHeadDim];
  float zero_sums_[kRowTile * kMaxVGroups];
  float maxima_[kRowTile];
  float sums_[kRowTile];

  SoftmaxRow softmax_[kRowTile];
  alignas(64) float out_[kRowTile * kMaxHeadDim];
};

}  // namespace bitdecoding::cpu
