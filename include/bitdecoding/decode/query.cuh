// SPDX-License-Identifier: Apache-2.0
// The queries of one segment: loaded as B operand, rotated where K is, brought to max |q| in
// [32, 64) by a power of two per column. What K's scales make of them once per group, Q' = q * scale,
// is in bytes/ and halves/.
#pragma once

#include "bitdecoding/decode/decode_problem.hpp"
#include "bitdecoding/decode/fragments.cuh"
#include "bitdecoding/element_type.hpp"
#include "bitdecoding/format/rotation.cuh"

namespace bitdecoding::decode {

// The operands of a segment's products with K's codes: bytes/query.cuh, halves/query.cuh.
template <class S>
struct Query;

// Of q over every 32 channels, for per-token K.
template <class S>
using QuerySums = ColumnTensor<S>[S::tiles / 2];

// Which query a column is: (query token, head of the group), heads fastest.
struct QueryColumns {
  int first;  // column of the tile's first
  int count;  // columns of all tiles: query tokens * group
  int group;  // query heads per KV head
};

__device__ inline float2 widen_pair(std::uint32_t pair, ElementType type) {
  if (type == ElementType::f16) return __half22float2(as_half2(pair));
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// The power of two that brings a column's largest magnitude to [32, 64): its exponent, where
// neither it nor its inverse leaves fp32 together with scales.
__device__ inline int column_exponent(float largest) {
  const int exponent = (__float_as_int(largest) >> 23 & 0xff) - 127;
  return largest > 0.f ? min(max(5 - exponent, -100), 60) : 0;
}

// A segment's queries as they lie in memory, on their way to registers: pairs of channels.
template <class S>
using QueryBits = QueryTensor<S>;

template <class S>
__device__ void load_query(const DecodeProblem& p, int sequence, int kv_head,
                           const QueryColumns& columns, int lane, QueryBits<S>& bits) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
    const int column = columns.first + S::operand_column(n, g);
    const bool real = column < columns.count;
    const int token = p.query_tokens == 1 ? 0 : column / columns.group;
    const int head = kv_head * columns.group + column - token * columns.group;
    const std::int64_t row =
        sequence * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
    const auto* channels =
        static_cast<const std::uint16_t*>(p.q) + row + 16 * S::first_own_tile(g) + 2 * t;
#pragma unroll
    for (int k = 0; k < S::own_tiles; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto* pair = reinterpret_cast<const std::uint32_t*>(channels + 16 * k + 8 * i);
        bits(i, n, k) = real ? *pair : 0u;
      }
    }
  }
}

// A column's channels that the lane has: 4k + 2i + e is channel e of the pair (i, n, k) of QueryBits.
template <class S>
using OwnChannels = float[4 * S::own_tiles];

template <class S>
__device__ void rotate_query(OwnChannels<S>& x, int block) {
  format::rotate<S::head_dim>(x, block, [](int distance) {
    if (distance == 1) return format::Partner{1, 0};
    if (distance < 8) return format::Partner{0, distance / 2};
    return distance < 16 * S::own_tiles ? format::Partner{distance / 4, 0} : format::Partner{0, 4};
  });
  // What an infinity or a NaN has spoilt is to be seen by a maximum, which passes over NaN.
#pragma unroll
  for (float& channel : x) channel = channel == channel ? channel : INFINITY;
}

// q, rotated where K is, times the column's power of two, and the scale that turns a score with it
// to the log2 domain: softmax scale * log2(e) / power of two.
template <class S>
__device__ void set_query(QueryTensor<S>& q, ColumnTensor<S>& scale, const QueryBits<S>& bits,
                          const DecodeProblem& p, int lane) {
  float operand_scale[S::n_tiles];  // of the lane's row of B
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
    OwnChannels<S> x;
#pragma unroll
    for (int i = 0; i < 2 * S::own_tiles; ++i) {
      const float2 pair = widen_pair(bits(i % 2, n, i / 2), p.type);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
    if (p.cache.format.k_rotation != 0) rotate_query<S>(x, p.cache.format.k_rotation);
    float largest = 0.f;
#pragma unroll
    for (const float channel : x) largest = fmaxf(largest, fabsf(channel));
    for (int distance = 1; distance < S::column_lanes; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    }
    // A negative softmax scale turns the queries, so that the largest product is the largest score.
    const int exponent = column_exponent(largest);
    const float power = copysignf(power_of_two(exponent), p.softmax_scale);
#pragma unroll
    for (int i = 0; i < 2 * S::own_tiles; ++i) {
      q(i % 2, n, i / 2) = as_bits(__floats2half2_rn(x[2 * i] * power, x[2 * i + 1] * power));
    }
    // An infinite query spoils its column, as it does on the CPU: bytes would make it finite.
    const float spoilt = 0.f * largest;
    operand_scale[n] = fabsf(p.softmax_scale) * 1.44269504f * power_of_two(-exponent) + spoilt;
  }
#pragma unroll
  for (int c = 0; c < S::lane_columns; ++c) {
    const float of_tile = operand_scale[c * S::n_tiles / S::lane_columns];
    scale(c) = __shfl_sync(0xffffffffu, of_tile, S::operand_lane(c, lane % 4));
  }
}

// Q' = q * scale of a K group; shifted(q): what is multiplied instead of q. `vectors` (t, piece,
// scale | zero): the group's parameters, 16-byte pieces.
template <class S, class Vectors, class Shifted>
__device__ void scale_query(const QueryTensor<S>& q, const Vectors& vectors, int lane,
                            const Shifted& shifted, QueryTensor<S>& scaled) {
  const int first_piece = S::first_own_tile(lane / 4) / 2;
#pragma unroll
  for (int piece = 0; piece < S::own_tiles / 2; ++piece) {
    const uint4 scales = vectors(lane % 4, first_piece + piece, 0);
    const std::uint32_t pairs[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = 2 * piece + i / 2;
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n) {
        scaled(i % 2, n, k) = multiply(shifted(q(i % 2, n, k)), pairs[i]);
      }
    }
  }
}

}  // namespace bitdecoding::decode
