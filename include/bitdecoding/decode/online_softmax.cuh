// SPDX-License-Identifier: Apache-2.0
// The running softmax of one stream, exact, with a lazy maximum: it moves only when a score exceeds
// it by the slack, so most items don't rescale. Weights leave as p = 2^(s - m + 11 - shift), where
// m guards max s + e, e bounds log2 of the item's V scales, and the shift splits e between weights
// and scales: neither p nor p * scale overflows fp16, and tokens far below a sink keep their bits.
#pragma once

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/decode/scores.cuh"

namespace bitdecoding::decode {

inline constexpr float kWeightExponent = 11.f;  // a weight at the maximum is 2^11
inline constexpr float kSlack = 4.f;            // and at most 2^15
inline constexpr float kMaximumFloor = -0x1p100f;

// Small scales are lifted wholly; of large ones the weights take one half, so that weights far below
// a sink don't become subnormal.
__device__ inline float weight_shift(float exponent) {
  return exponent < 0.f ? -exponent : -floorf(0.5f * exponent);
}

template <class S>
struct Softmax {
  ColumnTensor<S> maximum;  // m, log2 domain
  ColumnTensor<S> sum;      // of 2^(s - m + 11), this lane's rows

  __device__ void reset() {
    cute::fill(maximum, float{kMaximumFloor});
    cute::clear(sum);
  }
};

// Raises m where this item's largest s + e exceeds it by the slack; rescale(e, n, factor) is called
// for every column of the lane when any lane of the warp must.
template <class S, int Blocks, class Scale, class Rescale>
__device__ void update_maximum(const ScoreTensor<S, Blocks>& tSrS, const Scale& scale,
                               float exponent, Softmax<S>& softmax, const Rescale& rescale) {
  auto top = cute::make_tensor_like(softmax.maximum);
  bool raise = false;
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      top(e, n) = kMaximumFloor;
#pragma unroll
      for (int half = 0; half < (Blocks + 1) / 2; ++half) {
        float largest = fmaxf(tSrS(e, n, 2 * half), tSrS(e + 2, n, 2 * half));
        if (2 * half + 1 < Blocks) {
          largest = fmaxf(largest, fmaxf(tSrS(e, n, 2 * half + 1), tSrS(e + 2, n, 2 * half + 1)));
        }
        top(e, n) = fmaxf(top(e, n), largest * scale.factor[Scale::at(2 * half)](e, n) +
                                         (scale.bias[Scale::at(2 * half)](e, n) + exponent));
      }
      raise |= top(e, n) > softmax.maximum(e, n) + kSlack;
    }
  }
  if (!__any_sync(0xffffffffu, raise)) return;
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float largest = top(e, n);
      for (int distance = 4; distance < 32; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      }
      const float raised = fmaxf(softmax.maximum(e, n), largest);
      const float factor = arch::exp2(softmax.maximum(e, n) - raised);
      softmax.maximum(e, n) = raised;
      softmax.sum(e, n) *= factor;
      rescale(e, n, factor);
    }
  }
}

// Scores to weights in B operand order; adds their sum.
template <class S, int Blocks, class Scale>
__device__ void make_weights(const ScoreTensor<S, Blocks>& tSrS, const Scale& scale, float shift,
                             Softmax<S>& softmax, WeightTensor<S, Blocks>& tOrP) {
  const float unshift = __int_as_float((static_cast<int>(shift) + 127) << 23);
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
    float bias[2][2];
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int half = 0; half < (Blocks + 1) / 2; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        bias[half][e] = scale.bias[Scale::at(2 * half)](e, n) +
                        (kWeightExponent - shift - softmax.maximum(e, n));
      }
    }
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        float p[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          p[e] = arch::exp2(tSrS(2 * u + e, n, block) * scale.factor[Scale::at(block)](e, n) +
                            bias[block / 2][e]);
          sum[e] += p[e];
        }
        tOrP(u, n, block) = arch::transpose_8x8(as_bits(__floats2half2_rn(p[0], p[1])));
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) softmax.sum(e, n) += sum[e] * unshift;
  }
}

}  // namespace bitdecoding::decode
