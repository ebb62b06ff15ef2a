// SPDX-License-Identifier: Apache-2.0
// The running softmax of one stream, exact, with a lazy maximum: it moves only when a score exceeds
// it by the slack, so most items don't rescale. p = 2^(s - m + 11), where m guards max s + e and e
// bounds log2 of the item's V scales: p * scale doesn't overflow fp16.
#pragma once

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/decode/scores.cuh"

namespace bitdecoding::decode {

inline constexpr float kWeightExponent = 11.f;  // a weight at the maximum is 2^11
inline constexpr float kSlack = 4.f;            // and at most 2^15
inline constexpr float kMaximumFloor = -0x1p100f;

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

// Scores to p = 2^(s - m + 11), in place; adds their sum.
template <class S, int Blocks, class Scale>
__device__ void exponentiate(ScoreTensor<S, Blocks>& tSrS, const Scale& scale,
                             Softmax<S>& softmax) {
#pragma unroll
  for (int n = 0; n < S::n_tiles; ++n) {
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int row = 0; row < 2 * Blocks; ++row) {
      const int group = Scale::at(row / 2);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& s = tSrS(2 * (row % 2) + e, n, row / 2);
        s = arch::exp2(s * scale.factor[group](e, n) +
                       (scale.bias[group](e, n) + (kWeightExponent - softmax.maximum(e, n))));
        sum[e] += s;
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) softmax.sum(e, n) += sum[e];
  }
}

// p in accumulator order to weights in B operand order; weight(row, p): what becomes of p of the
// lane's token 8 * row + lane / 4.
template <class S, int Blocks, class Weight>
__device__ void make_operand(const ScoreTensor<S, Blocks>& tSrP, WeightTensor<S, Blocks>& tOrP,
                             const Weight& weight) {
#pragma unroll
  for (int row = 0; row < 2 * Blocks; ++row) {
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
      const float even = weight(row, tSrP(2 * (row % 2), n, row / 2));
      const float odd = weight(row, tSrP(2 * (row % 2) + 1, n, row / 2));
      tOrP(row % 2, n, row / 2) = arch::transpose_8x8(as_bits(__floats2half2_rn(even, odd)));
    }
  }
}

}  // namespace bitdecoding::decode
