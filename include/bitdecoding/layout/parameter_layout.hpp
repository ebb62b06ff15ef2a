// SPDX-License-Identifier: Apache-2.0
// Where scales, zero-points and norms lie in a page record, in the order in which lanes want them:
// CuTe layouts from (token, channel) to fp16 elements. A group's elements share one parameter, so
// the modes inside a group have stride 0. Zero-points follow their scales at a fixed distance.
//   channel axis (K): channel 8i + 2t + h at t * D/4 + 2i + h: lane t reads its query's pairs
//   token axis (V, K): token 8i + g of a chunk at 8g + i: lane g reads its accumulator's rows
//   blocks: likewise, a byte each, without zero-points
#pragma once

#include <cute/tensor.hpp>

#include "bitdecoding/layout/page_record.hpp"

namespace bitdecoding::layout {

// (token P, channel D) -> element, from the first K group's scales. Zeros lie HeadDim further.
template <int HeadDim>
constexpr auto channel_parameter_layout(const PageRecord& record) {
  using namespace cute;
  const KvFormat& f = record.format();
  const int groups_in_chunk = f.k_group < kChunkTokens ? kChunkTokens / f.k_group : 1;
  const int runs = f.page_tokens / (f.k_group * groups_in_chunk);
  const auto channels = Layout<Shape<_2, _4, Int<HeadDim / 8>>, Stride<_1, Int<HeadDim / 4>, _2>>{};
  const auto tokens =
      make_layout(make_shape(f.k_group, groups_in_chunk, runs),
                  make_stride(_0{}, Int<2 * HeadDim>{}, record.chunk_stride() / kParameter_bytes));
  return make_layout(tokens, channels);
}

// (token P) -> element, from the first chunk's plane of 64 values.
template <int Element_bytes = kParameter_bytes>
constexpr auto token_order_layout(const PageRecord& record) {
  using namespace cute;
  return make_layout(make_shape(_8{}, _8{}, record.format().chunks()),
                     make_stride(_8{}, _1{}, record.chunk_stride() / Element_bytes));
}

// (token P, channel) -> element, from the first chunk's scales. Zeros lie kChunkTokens further.
constexpr auto token_parameter_layout(const PageRecord& record, int group_channels) {
  using namespace cute;
  const int groups = record.format().head_dim / group_channels;
  return make_layout(
      token_order_layout(record),
      make_layout(make_shape(group_channels, groups), make_stride(_0{}, Int<2 * kChunkTokens>{})));
}

// (token P, channel) -> byte, from the first chunk's exponents of blocks.
constexpr auto exponent_layout(const PageRecord& record) {
  using namespace cute;
  const KvFormat& f = record.format();
  return make_layout(
      token_order_layout<kExponent_bytes>(record),
      make_layout(make_shape(f.v_group, f.v_groups()), make_stride(_0{}, Int<kChunkTokens>{})));
}

}  // namespace bitdecoding::layout
