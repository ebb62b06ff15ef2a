// SPDX-License-Identifier: Apache-2.0
// q or Q' as fp16, times the powers of two that undo the codes' positions.
#pragma once

#include "bitdecoding/decode/halves/fragments.cuh"
#include "bitdecoding/decode/query.cuh"

namespace bitdecoding::decode {

template <Halves S>
struct Query<S> {
  QueryTensor<S> q;       // times the column's power of two
  QueryTensor<S> scaled;  // Q' (channel axis) or q, times the codes' positions
  ColumnTensor<S> scale;  // see set_query
};

template <Halves S>
__device__ void apply_positions(QueryTensor<S>& scaled) {
  constexpr int kBits = S::page.k_bits;
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
    const int f = k_field<kBits>(k);
    if (f == 0) continue;
    const std::uint32_t factor = as_bits(__float2half2_rn(position_factor<kBits>(f)));
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
      scaled(0, n, k) = multiply(scaled(0, n, k), factor);
      scaled(1, n, k) = multiply(scaled(1, n, k), factor);
    }
  }
}

template <Halves S>
__device__ void prepare_token_axis(Query<S>& query, int /*lane*/) {
#pragma unroll
  for (int i = 0; i < cute::size(query.q); ++i) query.scaled(i) = query.q(i);
  apply_positions<S>(query.scaled);
}

// Some product of the lane overflowed fp16.
template <Halves S>
__device__ bool overflowed(const QueryTensor<S>& scaled) {
  __half2 largest = __float2half2_rn(0.f);
#pragma unroll
  for (int i = 0; i < cute::size(scaled); ++i) {
    largest = __hmax2(largest, __habs2(as_half2(scaled(i))));
  }
  // Infinity is the only one of their bit patterns with a carry out of its exponent.
  return ((as_bits(largest) + 0x04000400u) & 0x80008000u) != 0;
}

// Q' of a channel-axis group, the zero-points' share of every column's score, and the factor that
// brings code products to the log2 domain.
template <Halves S, class Vectors>
__device__ void apply_channel_group(Query<S>& query, const Vectors& vectors, int lane,
                                    ColumnTensor<S>& factor, ColumnTensor<S>& bias) {
  const ColumnTensor<S> zero_sum = sum_zeros<S>(query.q, vectors, lane);
  scale_query<S>(query.q, vectors, lane, [](std::uint32_t q) { return q; }, query.scaled);
  float unshrink = 1.f;
  if (__any_sync(0xffffffffu, overflowed<S>(query.scaled))) {  // scales above 1024
    constexpr std::uint32_t kShrink = 0x14001400u;             // 2^-10, twice
    const auto shrunk = [](std::uint32_t q) { return multiply(q, kShrink); };
    scale_query<S>(query.q, vectors, lane, shrunk, query.scaled);
    unshrink = 1024.f;
  }
  apply_positions<S>(query.scaled);
#pragma unroll
  for (int c = 0; c < S::lane_columns; ++c) {
    factor(c) = query.scale(c) * (kCodeFactor * unshrink);
    bias(c) = zero_sum(c) * query.scale(c);
  }
}

}  // namespace bitdecoding::decode
