// SPDX-License-Identifier: Apache-2.0
// Partial attention of a segment and how partials become the output. A partial is m (log2 domain),
// l = sum 2^(s - m + 11) and O of the same scale; merging is associative, and always in unit order.
//   memory   float o[columns][D + 4], m[columns], l[columns]
#pragma once

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/decode/query.cuh"
#include "bitdecoding/decode/values.cuh"

namespace bitdecoding::decode {

template <class S>
struct Partial {
  float o[S::columns][S::head_dim + 4];  // padded: lanes of a store meet different banks
  float maximum[S::columns];
  float sum[S::columns];
};

// Where column `column` of a segment goes in out (B,Sq,Hq,D) and lse (B,Hq,Sq).
struct OutputRow {
  std::int64_t out;  // element of channel 0
  std::int64_t lse;

  __device__ OutputRow(const DecodeProblem& p, int sequence, int kv_head, int group, int column) {
    const int token = column / group, head = kv_head * group + column % group;
    out = ((static_cast<std::int64_t>(sequence) * p.query_tokens + token) * p.query_heads + head) *
          p.cache.format.head_dim;
    lse = (static_cast<std::int64_t>(sequence) * p.query_heads + head) * p.query_tokens + token;
  }
};

__device__ inline void store_output(const DecodeProblem& p, std::int64_t index, float value) {
  if (p.type == ElementType::f16) {
    static_cast<__half*>(p.out)[index] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(p.out)[index] = __float2bfloat16_rn(value);
  }
}

__device__ inline float natural_lse(float maximum, float sum) {
  if (sum == 0.f) return -INFINITY;
  return 0.693147181f * (maximum - kWeightExponent + arch::log2(sum));
}

// Calls visit(column, channel, value) for the lane's outputs, and visit_column(column, m, l) once.
template <class S, class Visit, class VisitColumn>
__device__ void finish_stream(Output<S>& output, Softmax<S>& softmax, int v_group, int lane,
                              const Visit& visit, const VisitColumn& visit_column) {
  constexpr int kPartChannels = S::head_dim / S::V::v_parts;
  const int g = lane / 4, t = lane % 4;
  output.make_true();
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = softmax.sum(e, n);
      for (int distance = 4; distance < 32; distance *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      const int column = 8 * n + 2 * t + e;
      if (g == 0) visit_column(column, softmax.maximum(e, n), sum);
      float zero = 0.f;
#pragma unroll
      for (int part = 0; part < S::V::v_parts; ++part) {
        if (begins_group(part * kPartChannels, v_group)) zero = output.zero_sum[part](e, n);
#pragma unroll
        for (int tile = 0; tile < S::v_part_tiles; ++tile) {
          const int k = part * S::v_part_tiles + tile;
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            visit(column, 16 * k + g + 8 * u, output.tOrO(e + 2 * u, n, k) + zero, sum);
          }
        }
      }
    }
  }
}

// Merges the partials that partials.for_each visits, in its order: each thread some channels of
// some columns. store(column, channel, o, m, l): o, l relative to m; channel is a multiple of 4.
template <class S, class Partials, class Store>
__device__ void merge_partials(const Partials& partials, int columns, const Store& store) {
  constexpr int kQuads = S::head_dim / 4;
  for (int item = threadIdx.x; item < columns * kQuads; item += blockDim.x) {
    const int column = item / kQuads, channel = item % kQuads * 4;
    float maximum = kMaximumFloor;
    partials.for_each(
        [&](const Partial<S>& part) { maximum = fmaxf(maximum, part.maximum[column]); });
    float sum = 0.f;
    float4 o{0.f, 0.f, 0.f, 0.f};
    partials.for_each([&](const Partial<S>& part) {
      const float weight = arch::exp2(part.maximum[column] - maximum);
      const float4 more = *reinterpret_cast<const float4*>(&part.o[column][channel]);
      sum += weight * part.sum[column];
      o.x += weight * more.x;
      o.y += weight * more.y;
      o.z += weight * more.z;
      o.w += weight * more.w;
    });
    store(column, channel, o, maximum, sum);
  }
}

}  // namespace bitdecoding::decode
