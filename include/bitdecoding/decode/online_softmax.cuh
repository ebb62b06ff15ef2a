// SPDX-License-Identifier: Apache-2.0
// The running softmax of one stream. What an item's weights are relative to, and when m rises, is
// its products' choice (bytes/values.cuh, halves/values.cuh).
#pragma once

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/decode/scores.cuh"

namespace bitdecoding::decode {

inline constexpr float kMaximumFloor = -0x1p100f;
// Weights of halves are 2^11 where the score is the maximum, so that small ones keep their bits.
template <class S>
inline constexpr float kWeightExponent = S::product == Product::bytes ? 0.f : 11.f;

template <class S>
struct Softmax {
  ColumnTensor<S> maximum;  // m, log2 domain
  ColumnTensor<S> sum;      // of 2^(s - m + kWeightExponent), this lane's rows

  __device__ void reset() {
    cute::fill(maximum, float{kMaximumFloor});
    cute::clear(sum);
  }
};

// Of the lane's rows.
template <class S, int Blocks, class Scale>
__device__ float largest_score(const ScoreTensor<S, Blocks>& tSrS, const Scale& scale, int c) {
  float top = -INFINITY;
#pragma unroll
  for (int half = 0; half < (Blocks + 1) / 2; ++half) {
    float largest = fmaxf(tSrS(0, c, 2 * half), tSrS(1, c, 2 * half));
    if (2 * half + 1 < Blocks) {
      largest = fmaxf(largest, fmaxf(tSrS(0, c, 2 * half + 1), tSrS(1, c, 2 * half + 1)));
    }
    const int group = Scale::at(2 * half);
    top = fmaxf(top, largest * scale.factor[group](c) + scale.bias[group](c));
  }
  return top;
}

// Scores of a column to p = 2^(s + exponent), in place; returns their sum.
template <class S, int Blocks, class Scale>
__device__ float exponentiate(ScoreTensor<S, Blocks>& tSrS, const Scale& scale, int c,
                              float exponent) {
  float sum = 0.f;
#pragma unroll
  for (int row = 0; row < 2 * Blocks; ++row) {
    const int group = Scale::at(row / 2);
    float& s = tSrS(row % 2, c, row / 2);
    s = arch::exp2(s * scale.factor[group](c) + (scale.bias[group](c) + exponent));
    sum += s;
  }
  return sum;
}

}  // namespace bitdecoding::decode
