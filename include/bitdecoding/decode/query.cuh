// SPDX-License-Identifier: Apache-2.0
// The queries of one segment as B operands: loaded, brought to max |q| in [32, 64) by a power of
// two per column, and multiplied by K's scales once per group (Q' = q * scale, per-channel K).
#pragma once

#include "bitdecoding/decode/decode_problem.hpp"
#include "bitdecoding/decode/fragments.cuh"
#include "bitdecoding/element_type.hpp"

namespace bitdecoding::decode {

template <class S>
struct Query {
  QueryTensor<S> q;       // raw, times the column's power of two
  QueryTensor<S> scaled;  // times K's scales (channel axis) and the codes' positions
  ColumnTensor<S> scale;  // softmax scale * log2(e) / power of two: score -> log2 domain
};

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

// The power of two that brings a column's largest magnitude to [32, 64).
__device__ inline float column_power(float largest) {
  const int exponent = (__float_as_int(largest) >> 23 & 0xff) - 127;
  const int shift = min(max(5 - exponent, -100), 100);
  return largest > 0.f ? __int_as_float((shift + 127) << 23) : 1.f;
}

template <class S>
__device__ void load_query(Query<S>& query, const DecodeProblem& p, int sequence, int kv_head,
                           const QueryColumns& columns, int lane) {
  const int g = lane / 4, t = lane % 4;
  for (int n = 0; n < S::n_tiles; ++n) {
    const int column = columns.first + 8 * n + g;
    const bool real = column < columns.count;
    const int token = p.query_tokens == 1 ? 0 : column / columns.group;
    const int head = kv_head * columns.group + column - token * columns.group;
    const std::int64_t row =
        sequence * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
    const auto* channels = static_cast<const std::uint16_t*>(p.q) + row + 2 * t;
    std::uint32_t bits[S::tiles][2];  // all loads are under way before the first is used
#pragma unroll
    for (int k = 0; k < S::tiles; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto* pair = reinterpret_cast<const std::uint32_t*>(channels + 16 * k + 8 * i);
        bits[k][i] = real ? *pair : 0u;
      }
    }
    float2 pairs[S::tiles][2];
    float largest = 0.f;
#pragma unroll
    for (int k = 0; k < S::tiles; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pairs[k][i] = widen_pair(bits[k][i], p.type);
        largest = fmaxf(largest, fmaxf(fabsf(pairs[k][i].x), fabsf(pairs[k][i].y)));
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    // A negative softmax scale turns the queries, so that the largest product is the largest score.
    const float power = copysignf(column_power(largest), p.softmax_scale);
#pragma unroll
    for (int k = 0; k < S::tiles; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        query.q(i, n, k) = as_bits(__floats2half2_rn(pairs[k][i].x * power, pairs[k][i].y * power));
      }
    }
    const float scale = p.softmax_scale * 1.44269504f / power;
    query.scale(0, n) = __shfl_sync(0xffffffffu, scale, 8 * t);      // column 2t: lane 4 * 2t
    query.scale(1, n) = __shfl_sync(0xffffffffu, scale, 8 * t + 4);  // column 2t + 1
  }
}

// Multiplies by the powers of two of the codes' positions.
template <class S>
__device__ void apply_positions(QueryTensor<S>& scaled) {
  constexpr int kBits = S::page.k_bits;
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int f = 2 * (k % S::K::tiles_per_word) + i;
      if (f == 0) continue;
      const __half2 factor = __float2half2_rn(position_factor<kBits>(f));
#pragma unroll
      for (int n = 0; n < S::n_tiles; ++n) {
        scaled(i, n, k) = as_bits(__hmul2(as_half2(scaled(i, n, k)), factor));
      }
    }
  }
}

// Some product of the lane overflowed fp16.
template <class S>
__device__ bool overflowed(const QueryTensor<S>& scaled) {
  __half2 largest = __float2half2_rn(0.f);
#pragma unroll
  for (int i = 0; i < cute::size(scaled); ++i) {
    largest = __hmax2(largest, __habs2(as_half2(scaled(i))));
  }
  return __hisinf(__low2half(largest)) || __hisinf(__high2half(largest));
}

// Q' of a channel-axis group, the zero-points' share of every column's score, and the factor that
// brings code products to the log2 domain. `vectors` (t, piece, scale | zero): 16-byte pieces.
template <class S, class Vectors>
__device__ void apply_channel_group(Query<S>& query, const Vectors& vectors, int lane,
                                    ColumnTensor<S>& factor, ColumnTensor<S>& bias) {
  const int t = lane % 4;
  auto zero_sum = cute::make_tensor<float>(cute::Shape<_4, Int<S::n_tiles>>{});
  cute::clear(zero_sum);
  const auto build = [&](const auto& shrink) {
#pragma unroll
    for (int piece = 0; piece < S::tiles / 2; ++piece) {
      const uint4 scales = vectors(t, piece, 0);
      const std::uint32_t pairs[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = 2 * piece + i / 2;
#pragma unroll
        for (int n = 0; n < S::n_tiles; ++n) {
          query.scaled(i % 2, n, k) = multiply(shrink(query.q(i % 2, n, k)), pairs[i]);
        }
      }
    }
  };
#pragma unroll
  for (int piece = 0; piece < S::tiles / 2; ++piece) {
    const uint4 zeros = vectors(t, piece, 1);
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
      mma(zero_sum(_, n), {zeros.x, zeros.x, zeros.y, zeros.y}, query.q(_, n, 2 * piece));
      mma(zero_sum(_, n), {zeros.z, zeros.z, zeros.w, zeros.w}, query.q(_, n, 2 * piece + 1));
    }
  }
  build([](std::uint32_t q) { return q; });
  float unshrink = 1.f;
  if (__any_sync(0xffffffffu, overflowed<S>(query.scaled))) {  // scales above 1024
    const std::uint32_t factor_bits = 0x14001400u;             // 2^-10, twice
    build([&](std::uint32_t q) { return multiply(q, factor_bits); });
    unshrink = 1024.f;
  }
  apply_positions<S>(query.scaled);
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      factor(e, n) = query.scale(e, n) * (kCodeFactor * unshrink);
      bias(e, n) = zero_sum(e, n) * query.scale(e, n);
    }
  }
}

}  // namespace bitdecoding::decode
