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

// The power of two that brings a column's largest magnitude to [32, 64): its exponent.
__device__ inline int column_exponent(float largest) {
  const int exponent = (__float_as_int(largest) >> 23 & 0xff) - 127;
  return largest > 0.f ? min(max(5 - exponent, -100), 100) : 0;
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
    const int column = columns.first + 8 * n + g;
    const bool real = column < columns.count;
    const int token = p.query_tokens == 1 ? 0 : column / columns.group;
    const int head = kv_head * columns.group + column - token * columns.group;
    const std::int64_t row =
        sequence * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
    const auto* channels = static_cast<const std::uint16_t*>(p.q) + row + 2 * t;
#pragma unroll
    for (int k = 0; k < S::tiles; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto* pair = reinterpret_cast<const std::uint32_t*>(channels + 16 * k + 8 * i);
        bits(i, n, k) = real ? *pair : 0u;
      }
    }
  }
}

template <class S>
__device__ void set_query(Query<S>& query, const QueryBits<S>& bits, ElementType type,
                          float softmax_scale, int lane) {
  const int t = lane % 4;
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * S::tiles; ++i) {
      const float2 pair = widen_pair(bits(i % 2, n, i / 2), type);
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    // A negative softmax scale turns the queries, so that the largest product is the largest score.
    const int exponent = column_exponent(largest);
    const float power = copysignf(power_of_two(exponent), softmax_scale);
#pragma unroll
    for (int i = 0; i < 2 * S::tiles; ++i) {
      const float2 pair = widen_pair(bits(i % 2, n, i / 2), type);
      query.q(i % 2, n, i / 2) = as_bits(__floats2half2_rn(pair.x * power, pair.y * power));
    }
    const float scale = fabsf(softmax_scale) * 1.44269504f * power_of_two(-exponent);
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
  // Infinity is the only one of their bit patterns with a carry out of its exponent.
  return ((as_bits(largest) + 0x04000400u) & 0x80008000u) != 0;
}

// Q' of a channel-axis group, the zero-points' share of every column's score, and the factor that
// brings code products to the log2 domain. `vectors` (t, piece, scale | zero): 16-byte pieces.
template <class S, class Vectors>
__device__ void apply_channel_group(Query<S>& query, const Vectors& vectors, int lane,
                                    ColumnTensor<S>& factor, ColumnTensor<S>& bias) {
  const int t = lane % 4;
  // Two chains, so that an MMA needn't wait for the one before.
  auto zero_sum = cute::make_tensor<float>(cute::Shape<_4, Int<S::n_tiles>, _2>{});
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
      mma(zero_sum(_, n, 0), {zeros.x, zeros.x, zeros.y, zeros.y}, query.q(_, n, 2 * piece));
      mma(zero_sum(_, n, 1), {zeros.z, zeros.z, zeros.w, zeros.w}, query.q(_, n, 2 * piece + 1));
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
      bias(e, n) = (zero_sum(e, n, 0) + zero_sum(e, n, 1)) * query.scale(e, n);
    }
  }
}

}  // namespace bitdecoding::decode
