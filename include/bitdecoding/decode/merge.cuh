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

__device__ inline float warp_max(float value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}
__device__ inline float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// Merges partials.at(0 .. partials.end() - 1), nullptr for none, in this order: a warp takes a
// column, its lanes first a partial each (m, l), then four channels each (O, 8 partials at once).
// store(column, channel, o, m, l): o, l relative to m.
template <class S, class Partials, class Store>
__device__ void merge_partials(const Partials& partials, int columns, const Store& store) {
  constexpr int kBatch = 8;
  const int lane = threadIdx.x % 32;
  const int channel = lane * 4 % S::head_dim;
  for (int column = threadIdx.x / 32; column < columns; column += blockDim.x / 32) {
    float maximum = kMaximumFloor, sum = 0.f;
    float4 o{0.f, 0.f, 0.f, 0.f};
    for (int base = 0; base < partials.end(); base += 32) {
      const Partial<S>* mine = partials.at(base + lane);
      const float top = mine == nullptr ? kMaximumFloor : mine->maximum[column];
      const float raised = fmaxf(maximum, warp_max(top));
      const float shrink = arch::exp2(maximum - raised);
      const float weight = mine == nullptr ? 0.f : arch::exp2(top - raised);
      sum = sum * shrink + warp_sum(mine == nullptr ? 0.f : weight * mine->sum[column]);
      o = {o.x * shrink, o.y * shrink, o.z * shrink, o.w * shrink};
      maximum = raised;
      for (int first = 0; first < 32 && base + first < partials.end(); first += kBatch) {
        float4 more[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const Partial<S>* part = partials.at(base + first + i);
          more[i] = part == nullptr ? float4{0.f, 0.f, 0.f, 0.f}
                                    : *reinterpret_cast<const float4*>(&part->o[column][channel]);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float w = __shfl_sync(0xffffffffu, weight, first + i);
          o = {o.x + w * more[i].x, o.y + w * more[i].y, o.z + w * more[i].z, o.w + w * more[i].w};
        }
      }
    }
    if (lane * 4 < S::head_dim) store(column, channel, o, maximum, sum);
  }
}

}  // namespace bitdecoding::decode
