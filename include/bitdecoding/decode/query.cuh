// SPDX-License-Identifier: Apache-2.0
// The queries of one segment: loaded as B operand, rotated where K is, brought to max |q| in
// [32, 64) by a power of two per column. What K's scales make of them once per group, Q' = q * scale,
// is in bytes/ and halves/.
#pragma once

#include "bitdecoding/decode/fragments.cuh"
#include "bitdecoding/decode/ring.cuh"
#include "bitdecoding/element_type.hpp"
#include "bitdecoding/format/rotation.cuh"

namespace bitdecoding::decode {

// The operands of a segment's products with K's codes: bytes/query.cuh, halves/query.cuh.
template <class S>
struct Query;

// Of q over every 32 channels, for per-token K.
template <class S>
using QuerySums = ColumnTensor<S>[S::tiles / 2];

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

// A segment's queries as they lie in memory, to where set_query finds them. `first`: the first column
// of those that q is of, in a tile of tile_columns.
template <class S>
__device__ void load_query(const DecodeArguments& a, const SegmentPlace& segment, int tile_columns,
                           int first, int lane, QueryTensor<S>& q) {
  const DecodeProblem& p = a.problem;
  const int g = lane / 4, t = lane % 4;
  const int kv_head = a.column_tiles == 1 ? segment.head : segment.head / a.column_tiles;
  first += (segment.head - kv_head * a.column_tiles) * tile_columns;
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
    // Heads of the group come first, then query tokens.
    const int column = first + S::operand_column(n, g);
    const bool real = column < a.columns;
    const int token = p.query_tokens == 1 ? 0 : column / a.group;
    const int head = kv_head * a.group + column - token * a.group;
    const std::int64_t row =
        segment.sequence * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
    const auto* channels =
        static_cast<const std::uint16_t*>(p.q) + row + 16 * S::first_own_tile(g) + 2 * t;
#pragma unroll
    for (int k = 0; k < S::own_tiles; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto* pair = reinterpret_cast<const std::uint32_t*>(channels + 16 * k + 8 * i);
        q(i, n, k) = real ? *pair : 0u;
      }
    }
  }
}

// A column's channels that the lane has: 4k + 2i + e is channel e of the pair (i, n, k) of q.
template <class S>
using OwnChannels = float[4 * S::own_tiles];

// H q but for its scale. The order of its steps, which matters for what the cache holds, is free here:
// those between lanes are one loop. Values 1 apart are neighbours, values 2 and more apart four times
// as many channels; lanes 1 and 2 apart are 2 and 4 channels apart, and those that share a column as
// many as four times a lane's values.
template <class S>
__device__ void rotate_query(OwnChannels<S>& x, int block) {
  constexpr int kValues = 4 * S::own_tiles;
  format::rotate_values<1, 4>(x, 4);
  format::rotate_values<4, kValues>(x, block / 4);
  format::rotate_lanes(x, block > 4 * kValues ? 8 : 4);
}

// q becomes fp16, rotated where K is, times the column's power of two; scale: what turns a score with
// it to the log2 domain, softmax scale * log2(e) / power of two.
template <class S>
__device__ void set_query(QueryTensor<S>& q, ColumnTensor<S>& scale, const DecodeProblem& p,
                          int lane) {
  const int rotation = p.cache.format.k_rotation;
  const float scale_of_all =
      fabsf(p.softmax_scale) * 1.44269504f * format::rotation_scale(rotation);
  float operand_scale[S::n_tiles];  // of the lane's row of B
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
    OwnChannels<S> x;
#pragma unroll
    for (int i = 0; i < 2 * S::own_tiles; ++i) {
      const float2 pair = widen_pair(q(i % 2, n, i / 2), p.type);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
    if (rotation != 0) rotate_query<S>(x, rotation);
    float largest_of[4] = {};  // so that a maximum needn't wait for the one before
#pragma unroll
    for (int i = 0; i < 4 * S::own_tiles; ++i) {
      largest_of[i % 4] = arch::max_or_nan(largest_of[i % 4], fabsf(x[i]));
    }
    float largest = arch::max_or_nan(arch::max_or_nan(largest_of[0], largest_of[1]),
                                     arch::max_or_nan(largest_of[2], largest_of[3]));
    for (int distance = 1; distance < S::column_lanes; distance *= 2) {
      largest = arch::max_or_nan(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    }
    // A negative softmax scale turns the queries, so that the largest product is the largest score.
    const int exponent = column_exponent(largest);
    const float power = copysignf(power_of_two(exponent), p.softmax_scale);
#pragma unroll
    for (int i = 0; i < 2 * S::own_tiles; ++i) {
      q(i % 2, n, i / 2) = as_bits(__floats2half2_rn(x[2 * i] * power, x[2 * i + 1] * power));
    }
    // What isn't finite spoils its column, as it does on the CPU: bytes would make it finite.
    const float spoilt = 0.f * largest;
    operand_scale[n] = scale_of_all * power_of_two(-exponent) + spoilt;
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
