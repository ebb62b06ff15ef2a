// SPDX-License-Identifier: Apache-2.0
// Minimum and maximum of quantisation groups of one tile in shared memory, and from them scales,
// zero-points and coders. Lanes that share a group sit side by side and meet by shuffles.
//   in   sX (N,D) fp16, finite or NaN       out  parameters in the page, coders in shared memory
#pragma once

#include <cuda_fp16.h>

#include <cute/tensor.hpp>

#include "bitdecoding/format/quantizer.hpp"

namespace bitdecoding::quantize {

// Groups are whole runs of 32 values: tokens of one channel, or channels of one token.
inline constexpr int kRunValues = 32;

// Group and page sizes are powers of two: a shift instead of a division.
__device__ inline int log2_of(int power) { return 31 - __clz(power); }

// Minimum and maximum of two neighbouring values at once; NaN stays.
struct PairRange {
  __half2 low = __half2half2(__ushort_as_half(0x7c00));   // +inf
  __half2 high = __half2half2(__ushort_as_half(0xfc00));  // -inf

  __device__ void include(__half2 pair) {
    low = __hmin2_nan(low, pair);
    high = __hmax2_nan(high, pair);
  }
  // Takes in the ranges of the 2, 4, ... `lanes` lanes around this one.
  __device__ void include_lanes(int lanes) {
    for (int distance = 1; distance < lanes; distance *= 2) {
      low = __hmin2_nan(low, __shfl_xor_sync(0xffffffffu, low, distance));
      high = __hmax2_nan(high, __shfl_xor_sync(0xffffffffu, high, distance));
    }
  }
};

__device__ inline format::GroupRange group_range(__half low, __half high) {
  return {__half2float(low), __half2float(high), __hisnan(low) || __hisnan(high)};
}

// Ranges along tokens: visit(channel, token, range) once for every channel and K group, where
// `token` is the group's first and tokens before `first_token` count for nothing.
template <int Threads, class Tile, class Visit>
__device__ void visit_channel_groups(const Tile& sX, int tokens, int group_tokens, int first_token,
                                     const Visit& visit) {
  constexpr int kPairs = cute::size<1>(Tile{}.layout()) / 2;
  const int runs = tokens / kRunValues, runs_log2 = log2_of(runs);
  const int runs_per_group = group_tokens / kRunValues;
#pragma unroll 1
  for (int item = threadIdx.x; item < kPairs * runs; item += Threads) {
    const int run = item & (runs - 1);
    const int channel = item >> runs_log2 << 1;
    PairRange range;
#pragma unroll 8
    for (int step = 0; step < kRunValues; ++step) {
      // Runs start two tokens apart, so that lanes of different runs hit different banks.
      const int token = run * kRunValues + (step + 2 * run) % kRunValues;
      if (token >= first_token) {
        range.include(*reinterpret_cast<const __half2*>(&sX(token, channel)));
      }
    }
    range.include_lanes(runs_per_group);
    if ((run & (runs_per_group - 1)) == 0) {
      const int token = run * kRunValues;
      visit(channel, token, group_range(__low2half(range.low), __low2half(range.high)));
      visit(channel + 1, token, group_range(__high2half(range.low), __high2half(range.high)));
    }
  }
}

// Ranges along channels: visit(channel, token, range) once for every token and channel group, where
// `channel` is the group's first.
template <int Threads, class Tile, class Visit>
__device__ void visit_token_groups(const Tile& sX, int tokens, int group_channels,
                                   const Visit& visit) {
  constexpr int kRuns = cute::size<1>(Tile{}.layout()) / kRunValues;
  const int runs_per_group = group_channels / kRunValues;
#pragma unroll 1
  for (int item = threadIdx.x; item < kRuns * tokens; item += Threads) {
    const int run = item % kRuns;
    const int token = item / kRuns;
    const uint4* values = reinterpret_cast<const uint4*>(&sX(token, run * kRunValues));
    PairRange range;
#pragma unroll
    for (int i = 0; i < kRunValues / 8; ++i) {
      const uint4 eight = values[i];
      for (const unsigned pair : {eight.x, eight.y, eight.z, eight.w}) {
        range.include(*reinterpret_cast<const __half2*>(&pair));
      }
    }
    range.include_lanes(runs_per_group);
    if ((run & (runs_per_group - 1)) == 0) {
      const __half low = __hmin_nan(__low2half(range.low), __high2half(range.low));
      const __half high = __hmax_nan(__low2half(range.high), __high2half(range.high));
      visit(run * kRunValues, token, group_range(low, high));
    }
  }
}

}  // namespace bitdecoding::quantize
