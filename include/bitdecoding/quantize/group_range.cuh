// SPDX-License-Identifier: Apache-2.0
// Minimum and maximum of quantisation groups of one tile in shared memory, and from them scales,
// zero-points and coders. First each run of 32 values leaves its range in a table; then a thread
// takes a group, so that all lanes share the work of its parameters.
//   in   sX (N,D) fp16       out  ranges, then parameters in the page and coders in shared memory
#pragma once

#include <cuda_fp16.h>

#include <cute/tensor.hpp>

#include "bitdecoding/format/quantizer.hpp"
#include "bitdecoding/quantize/token_tile.cuh"

namespace bitdecoding::quantize {

// Group and page sizes are powers of two: a shift instead of a division.
__device__ inline int log2_of(int power) { return 31 - __clz(power); }

// What a group's values are coded with: 1 / scale is 2^-bits times as large as in GroupCoder.
struct Coder {
  float zero, factor;
};

// Of all groups of a tile: one row per group of the grouped axis, one column per element of the
// other axis (channel axis: [token group][channel], token axis: [channel group][token]). Ranges
// along tokens have a row per run instead. A range is (low, -high): both are minima.
inline constexpr int kMaxGroups = 4;
struct GroupTable {
  Coder coder[kMaxGroups][kMaxPageTokens];
  __half2 range[kMaxGroups][kMaxPageTokens];
};

// Minimum and maximum of two neighbouring values at once; NaN stays.
struct PairRange {
  __half2 low = __half2half2(__ushort_as_half(0x7c00));   // +inf
  __half2 high = __half2half2(__ushort_as_half(0xfc00));  // -inf

  __device__ void include(__half2 pair) {
    low = __hmin2_nan(low, pair);
    high = __hmax2_nan(high, pair);
  }
  __device__ void include(uint4 eight) {
    for (const unsigned pair : {eight.x, eight.y, eight.z, eight.w}) {
      include(reinterpret_cast<const __half2&>(pair));
    }
  }
  // As the table holds it: of the first, of the second, of both values.
  __device__ __half2 of_low() const { return __lows2half2(low, __hneg2(high)); }
  __device__ __half2 of_high() const { return __highs2half2(low, __hneg2(high)); }
  __device__ __half2 of_both() const { return __hmin2_nan(of_low(), of_high()); }
};

// Infinities saturate; an empty range stays empty.
__device__ inline format::GroupRange group_range(__half2 low_and_negated_high) {
  const float2 range = __half22float2(saturate(low_and_negated_high));
  return {range.x, -range.y, range.x != range.x || range.y != range.y};
}

// Ranges along tokens, one per run: range[token / 32][channel]; tokens before `first_token` count
// for nothing. A warp reads rows of 32 channel pairs.
template <int Threads, class Tile>
__device__ void find_channel_ranges(const Tile& sX, int tokens, int first_token,
                                    GroupTable& table) {
  constexpr int kPairs = cute::size<1>(Tile{}.layout()) / 2;
  const int runs = tokens / kRunValues;
#pragma unroll 1
  for (int item = threadIdx.x; item < kPairs * runs; item += Threads) {
    const int run = item / kPairs, channel = item % kPairs * 2;
    const int begin = run * kRunValues, first = max(first_token - begin, 0);
    PairRange range;
    const auto include = [&](int step) {
      range.include(reinterpret_cast<const __half2&>(sX(begin + step, channel)));
    };
    if (first == 0) {
#pragma unroll
      for (int step = 0; step < kRunValues; ++step) include(step);
    } else {
#pragma unroll 1
      for (int step = first; step < kRunValues; ++step) include(step);
    }
    table.range[run][channel] = range.of_low();
    table.range[run][channel + 1] = range.of_high();
  }
}

// Ranges along channels: range[channel / group][token].
template <int Threads, class Tile>
__device__ void find_token_ranges(const Tile& sX, int tokens, int group_channels,
                                  GroupTable& table) {
  constexpr int kRuns = cute::size<1>(Tile{}.layout()) / kRunValues;
  const int runs_per_group = group_channels / kRunValues;
  visit_quarters<Threads>(tokens, [&](const Quarter& quarter) {
    PairRange range;
    int group = 0;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      range.include(
          reinterpret_cast<const uint4&>(sX(quarter.token, quarter.channel + run * kRunValues)));
      if ((run + 1) % runs_per_group != 0) continue;
      __half2 all = range.of_both();
      for (int distance = kQuarterTokens; distance < 32; distance *= 2) {
        all = __hmin2_nan(all, __shfl_xor_sync(0xffffffffu, all, distance));
      }
      if (quarter.channel == 0) table.range[group][quarter.token] = all;
      range = {};
      ++group;
    }
  });
}

// Calls visit(group, column, parameters) for all groups of a tile of `columns` columns, a power of
// two, and leaves the coders. A group's range is that of `rows` rows of the table.
template <int Threads, int Bits, class Visit>
__device__ void visit_groups(GroupTable& table, int groups, int columns, int rows,
                             const Visit& visit) {
  constexpr float kUnit = 1.f / (1 << Bits);
  const int columns_log2 = log2_of(columns);
#pragma unroll 1
  for (int item = threadIdx.x; item < groups * columns; item += Threads) {
    const int group = item >> columns_log2, column = item & (columns - 1);
    __half2 range = table.range[group * rows][column];
    for (int row = 1; row < rows; ++row) {
      range = __hmin2_nan(range, table.range[group * rows + row][column]);
    }
    const auto parameters = format::group_parameters(group_range(range), Bits);
    visit(group, column, parameters);
    const format::GroupCoder coder(parameters);
    table.coder[group][column] = {coder.zero, coder.inverse_scale * kUnit};
  }
}

}  // namespace bitdecoding::quantize
