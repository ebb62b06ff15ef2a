// SPDX-License-Identifier: Apache-2.0
// q or Q' as bytes: 16-bit fixed point, (254 * upper + lower) / (254 * 2^e), one e per column.
// Upper and lower bytes lie in neighbouring columns of B, so that both sums of a query meet in one
// lane.
#pragma once

#include "bitdecoding/decode/bytes/fragments.cuh"
#include "bitdecoding/decode/query.cuh"

namespace bitdecoding::decode {

template <Bytes S>
struct Query<S> {
  QueryTensor<S> q;        // times the column's power of two
  QueryBytes<S> bytes;     // of Q' (channel axis) or q
  ColumnTensor<S> scale;   // see set_query
  ColumnTensor<S> factor;  // per-token K: what brings the bytes' sums back to q
};

// The largest magnitude of a column, twice: infinity if a product overflowed fp16.
template <Bytes S>
__device__ __half2 largest_of_column(const QueryTensor<S>& pairs) {
  __half2 largest = __float2half2_rn(0.f);
#pragma unroll
  for (int i = 0; i < cute::size(pairs); ++i) {
    largest = __hmax2(largest, __habs2(as_half2(pairs(i))));
  }
  for (int distance = 1; distance < S::column_lanes; distance *= 2) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffu, as_bits(largest), distance);
    largest = __hmax2(largest, as_half2(other));
  }
  return __hmax2(largest, __lowhigh2highlow(largest));
}

inline constexpr int kUpperByte = 254;

// e with magnitude * 2^e < 127.5, so that it rounds to an upper byte; at most 14, since 2^e must be
// an fp16. `magnitude`: fp16, twice.
__device__ inline int byte_exponent(__half2 magnitude) {
  constexpr std::uint32_t kCarry = 0x8;  // from 127.5 / 128 of a power of two on
  const int exponent = static_cast<int>(((as_bits(magnitude) & 0x7fffu) + kCarry) >> 10) - 15;
  return min(6 - exponent, 14);
}

// `pairs` of all channels to the bytes that the lane holds of them: upper ones where g is even,
// lower ones where it is odd. Both lanes of a column split their own channels and swap.
template <Bytes S>
__device__ void split_in_bytes(const QueryTensor<S>& pairs, int exponent, int lane,
                               QueryBytes<S>& bytes) {
  const bool is_odd = lane / 4 % 2 != 0;
  // The sum with 1.5 * 2^10 has the nearest integer in its lowest byte, two's complement.
  const __half2 round = __float2half2_rn(1536.f);
  const __half2 scale = __float2half2_rn(power_of_two(exponent));
  const __half2 lower_scale = __float2half2_rn(kUpperByte);
#pragma unroll
  for (int k = 0; k < S::own_tiles; ++k) {
    std::uint32_t upper[2], lower[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __half2 value = as_half2(pairs(i, 0, k));
      const __half2 rounded = __hfma2(value, scale, round);
      const __half2 rest = __hfma2(value, scale, __hsub2(round, rounded));
      upper[i] = as_bits(rounded);
      lower[i] = as_bits(__hfma2(rest, lower_scale, round));
    }
    const std::uint32_t upper_bytes = __byte_perm(upper[0], upper[1], 0x6240);
    const std::uint32_t lower_bytes = __byte_perm(lower[0], lower[1], 0x6240);
    const std::uint32_t kept = is_odd ? lower_bytes : upper_bytes;
    const std::uint32_t swapped =
        __shfl_xor_sync(0xffffffffu, is_odd ? upper_bytes : lower_bytes, 4);
    const int low_tile = k, high_tile = k + S::own_tiles;
    bytes(low_tile % 2, low_tile / 2) = is_odd ? swapped : kept;
    bytes(high_tile % 2, high_tile / 2) = is_odd ? kept : swapped;
  }
}

// What brings a column's CodeSums back to sums of code * value. `exponent`: of the lane's operand.
template <Bytes S>
__device__ float byte_factor(int exponent, int lane) {
  const int of_column = __shfl_sync(0xffffffffu, exponent, S::operand_lane(0, lane % 4));
  return power_of_two(-of_column) * (1.f / (kUpperByte * kOddField<S::page.k_bits>));
}

template <Bytes S>
__device__ void prepare_token_axis(Query<S>& query, int lane) {
  const int exponent = byte_exponent(largest_of_column<S>(query.q));
  split_in_bytes<S>(query.q, exponent, lane, query.bytes);
  query.factor(0) = byte_factor<S>(exponent, lane);
}

// Of q over every 32 channels. MMA columns 2t and 2t + 1 are the two halves of the channels.
template <Bytes S>
__device__ void sum_query(const QueryTensor<S>& q, QuerySums<S>& sums) {
#pragma unroll
  for (int pair = 0; pair < S::own_tiles / 2; ++pair) {
    auto sum = cute::make_tensor<float>(cute::Shape<_4>{});
    cute::clear(sum);
    mma(sum, ones(), q(_, 0, 2 * pair));
    mma(sum, ones(), q(_, 0, 2 * pair + 1));
    sums[pair](0) = sum(0);
    sums[pair + S::own_tiles / 2](0) = sum(1);
  }
}

// sum(q * zero) over a K group's channels: an MMA whose rows all hold the zero-points, rows g of
// one half of the channels, which meet the even columns, rows g + 8 of the other.
template <Bytes S, class Vectors>
__device__ float sum_zeros(const QueryTensor<S>& q, const Vectors& vectors, int lane) {
  constexpr int kPieces = S::own_tiles / 2;
  // Two chains, so that an MMA needn't wait for the one before.
  auto sum = cute::make_tensor<float>(cute::Shape<_4, _2>{});
  cute::clear(sum);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const uint4 low = vectors(lane % 4, piece, 1), high = vectors(lane % 4, piece + kPieces, 1);
    mma(sum(_, 0), {low.x, high.x, low.y, high.y}, q(_, 0, 2 * piece));
    mma(sum(_, 1), {low.z, high.z, low.w, high.w}, q(_, 0, 2 * piece + 1));
  }
  return (sum(0, 0) + sum(3, 0)) + (sum(0, 1) + sum(3, 1));
}

// The power of two, as exponent, that brings q * scale into the range of fp16: q is below 64,
// scales up to 65504, and small products would lose bits.
__device__ inline int range_shift(__half2 largest) {
  constexpr std::uint32_t kInfinity = 0x7c00u, kSmall = 0x1c00u;  // 2^-8
  const std::uint32_t bits = as_bits(largest) & 0x7fffu;
  if (bits >= kInfinity) return -10;
  return bits < kSmall && bits > 0u ? 9 : 0;
}

// Q' of a channel-axis group, the zero-points' share of every column's score, and the factor that
// brings code products to the log2 domain.
template <Bytes S, class Vectors>
__device__ void apply_channel_group(Query<S>& query, const Vectors& vectors, int lane,
                                    ColumnTensor<S>& factor, ColumnTensor<S>& bias) {
  const float zero_sum = sum_zeros<S>(query.q, vectors, lane);
  QueryTensor<S> scaled;
  scale_query<S>(query.q, vectors, lane, [](std::uint32_t q) { return q; }, scaled);
  __half2 largest = largest_of_column<S>(scaled);
  const int shift = range_shift(largest);
  if (__any_sync(0xffffffffu, shift != 0)) {
    const std::uint32_t power = as_bits(__float2half2_rn(power_of_two(shift)));
    const auto shifted = [&](std::uint32_t q) { return multiply(q, power); };
    scale_query<S>(query.q, vectors, lane, shifted, scaled);
    largest = largest_of_column<S>(scaled);
  }
  const int exponent = byte_exponent(largest);
  split_in_bytes<S>(scaled, exponent, lane, query.bytes);
  factor(0) = query.scale(0) * byte_factor<S>(exponent + shift, lane);
  bias(0) = zero_sum * query.scale(0);
}

}  // namespace bitdecoding::decode
