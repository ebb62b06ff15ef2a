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
struct alignas(16) Partial {
  float o[S::columns][S::head_dim + 4];  // padded: lanes of a store meet different banks
  float maximum[S::columns];
  float sum[S::columns];
};

// Where column `column` of a segment goes in out (B,Sq,Hq,D) and lse (B,Hq,Sq).
struct OutputRow {
  std::int64_t out;  // element of channel 0
  std::int64_t lse;

  __device__ OutputRow(const DecodeProblem& p, int sequence, int kv_head, int group, int column) {
    const int token = p.query_tokens == 1 ? 0 : column / group;
    const int head = kv_head * group + column - token * group;
    out = ((static_cast<std::int64_t>(sequence) * p.query_tokens + token) * p.query_heads + head) *
          p.cache.format.head_dim;
    lse = (static_cast<std::int64_t>(sequence) * p.query_heads + head) * p.query_tokens + token;
  }
};

// Four channels, from element `index` on.
__device__ inline void store_output(const DecodeProblem& p, std::int64_t index, float4 o) {
  uint2 bits;
  if (p.type == ElementType::f16) {
    bits = {as_bits(__floats2half2_rn(o.x, o.y)), as_bits(__floats2half2_rn(o.z, o.w))};
  } else {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(o.x, o.y),
                                     __floats2bfloat162_rn(o.z, o.w)};
    bits = reinterpret_cast<const uint2&>(pairs);
  }
  *reinterpret_cast<uint2*>(static_cast<std::uint16_t*>(p.out) + index) = bits;
}

__device__ inline float natural_lse(float maximum, float sum) {
  if (sum == 0.f) return -INFINITY;
  return 0.693147181f * (maximum - kWeightExponent + arch::log2(sum));
}

// A stream's result to memory.
template <class S>
__device__ void store_partial(Output<S>& output, Softmax<S>& softmax, int v_group, int lane,
                              Partial<S>& partial) {
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
      if (g == 0) {
        partial.maximum[column] = softmax.maximum(e, n);
        partial.sum[column] = sum;
      }
      float zero = 0.f;
#pragma unroll
      for (int part = 0; part < S::V::v_parts; ++part) {
        if (begins_group(part * kPartChannels, v_group)) zero = output.zero_sum[part](e, n);
#pragma unroll
        for (int tile = 0; tile < S::v_part_tiles; ++tile) {
          const int k = part * S::v_part_tiles + tile;
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            partial.o[column][16 * k + g + 8 * u] = output.tOrO(e + 2 * u, n, k) + zero;
          }
        }
      }
    }
  }
}

// By one warp.
template <class S>
__device__ void copy_partial(const Partial<S>& from, Partial<S>& to, int lane) {
  static_assert(sizeof(Partial<S>) % sizeof(float4) == 0);
  for (int i = lane; i < static_cast<int>(sizeof(Partial<S>) / sizeof(float4)); i += 32) {
    reinterpret_cast<float4*>(&to)[i] = reinterpret_cast<const float4*>(&from)[i];
  }
}

// Merges a column of the partials.count() partials that partials.next() gives, in this order, by one
// warp: four channels per lane, and every lane weighs all partials, since shuffles take longer. All
// loads of a batch are under way before the first is used, and nothing branches.
// store(channel, o, m, l): o, l relative to m.
template <class S, class Partials, class Store>
__device__ void merge_column(Partials partials, int column, const Store& store) {
  constexpr int kBatch = Partials::kBatch;
  const int channel = threadIdx.x % 32 * 4 % S::head_dim;
  const int count = partials.count();
  float maximum = kMaximumFloor, sum = 0.f;
  float4 o{0.f, 0.f, 0.f, 0.f};
  for (int first = 0; first < count; first += kBatch) {
    float4 more[kBatch];
    float top[kBatch], weighed[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Partial<S>& part = partials.next();
      top[i] = part.maximum[column];
      weighed[i] = part.sum[column];
      more[i] = *reinterpret_cast<const float4*>(&part.o[column][channel]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {  // those behind the last are the last again
      if (first + i >= count) top[i] = -INFINITY;
    }
    float raised = maximum;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) raised = fmaxf(raised, top[i]);
    const float shrink = arch::exp2(maximum - raised);
    maximum = raised;
    sum *= shrink;
    o = {o.x * shrink, o.y * shrink, o.z * shrink, o.w * shrink};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float w = arch::exp2(top[i] - raised);
      sum += w * weighed[i];
      o = {o.x + w * more[i].x, o.y + w * more[i].y, o.z + w * more[i].z, o.w + w * more[i].w};
    }
  }
  if (threadIdx.x % 32 * 4 < S::head_dim) store(channel, o, maximum, sum);
}

}  // namespace bitdecoding::decode
