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

// The lane's columns of one n tile's accumulators.
template <Halves S, class Sum>
__device__ void take_columns(const Sum& sum, int n, ColumnTensor<S>& sums) {
  constexpr int kColumns = S::lane_columns / S::n_tiles;
#pragma unroll
  for (int e = 0; e < kColumns; ++e) sums(n * kColumns + e) = sum(e);
}

// Of q over every 32 channels.
template <Halves S>
__device__ void sum_query(const QueryTensor<S>& q, QuerySums<S>& sums) {
#pragma unroll
  for (int pair = 0; pair < S::tiles / 2; ++pair) {
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
      auto sum = cute::make_tensor<float>(cute::Shape<_4>{});
      cute::clear(sum);
      mma(sum, ones(), q(_, n, 2 * pair));
      mma(sum, ones(), q(_, n, 2 * pair + 1));
      take_columns<S>(sum, n, sums[pair]);
    }
  }
}

// sum(q * zero) over a K group's channels: an MMA whose rows all hold the zero-points.
// `vectors` (t, piece, scale | zero): 16-byte pieces.
template <Halves S, class Vectors>
__device__ ColumnTensor<S> sum_zeros(const QueryTensor<S>& q, const Vectors& vectors, int lane) {
  ColumnTensor<S> sums;
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
    // Two chains, so that an MMA needn't wait for the one before.
    auto sum = cute::make_tensor<float>(cute::Shape<_4, _2>{});
    cute::clear(sum);
#pragma unroll
    for (int piece = 0; piece < S::tiles / 2; ++piece) {
      const uint4 zeros = vectors(lane % 4, piece, 1);
      mma(sum(_, 0), {zeros.x, zeros.x, zeros.y, zeros.y}, q(_, n, 2 * piece));
      mma(sum(_, 1), {zeros.z, zeros.z, zeros.w, zeros.w}, q(_, n, 2 * piece + 1));
    }
    take_columns<S>([&](int e) { return sum(e, 0) + sum(e, 1); }, n, sums);
  }
  return sums;
}

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
