// SPDX-License-Identifier: Apache-2.0
// format::rotate by a warp whose lanes share rows: the same bits, wherever the channels lie.
#pragma once

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/format/rotation.hpp"

namespace bitdecoding::format {

// Values of a lane that are Begin, 2 * Begin .. apart, below End and `end`, become their sums and
// differences.
template <int Begin, int End, int Values>
__device__ void rotate_values(float (&x)[Values], int end) {
#pragma unroll
  for (int step = Begin; step < End; step *= 2) {
    if (step >= end) return;
#pragma unroll
    for (int i = 0; i < Values; ++i) {
      if ((i & step) != 0) continue;
      const float a = x[i], b = x[i + step];
      x[i] = __fadd_rn(a, b);
      x[i + step] = __fsub_rn(a, b);
    }
  }
}

// So do values of lanes whose numbers differ in bit 1, 2 .. below `end`. Called by whole warps. A
// loop where there are many: decode comes here once or twice a call, and waits for instructions that
// it hasn't fetched yet.
template <int Values>
__device__ void rotate_lanes(float (&x)[Values], int end) {
  constexpr int kSteps = 5, kUnrolled = Values > 8 ? 1 : kSteps;
#pragma unroll kUnrolled
  for (int step = 1; step < 1 << kSteps; step *= 2) {
    if (step >= end) return;
    const float sign = (arch::lane_id() & step) != 0 ? -1.f : 1.f;
#pragma unroll
    for (float& value : x) {
      const float other = __shfl_xor_sync(0xffffffffu, value, step);
      value = __fmaf_rn(value, sign, other);  // the product is exact
    }
  }
}

// Of rows that Lanes lanes have in pieces of Piece channels, piece after piece; x: the lane's pieces.
// Called by whole warps, `block` the same in all lanes; 0 changes nothing.
template <int Piece, int Lanes, int Values>
__device__ void rotate(float (&x)[Values], int block) {
  if (block == 0) return;
  rotate_values<1, Piece>(x, block);
  rotate_lanes(x, min(Lanes, block / Piece));
  rotate_values<Piece, Values>(x, block / Lanes);
  const float scale = rotation_scale(block);
#pragma unroll
  for (float& value : x) value = __fmul_rn(value, scale);
}

}  // namespace bitdecoding::format
