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
template <KAxis Axis, int HeadDim>
struct GroupTable {
  static constexpr int kColumns = Axis == KAxis::channel ? HeadDim : kMaxPageTokens;
  static constexpr int kRows = kMaxPageTokens * HeadDim / (kRunValues * kColumns);
  Coder coder[kRows][kColumns];
  __half2 range[kRows][kColumns];
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
  __device__ __half2 of_low() const { return negate_second(__lows2half2(low, high)); }
  __device__ __half2 of_high() const { return negate_second(__highs2half2(low, high)); }
  __device__ __half2 of_both() const { return __hmin2_nan(of_low(), of_high()); }

 private:
  // A flip of the sign: one instruction on the pair as it is.
  static __device__ __half2 negate_second(__half2 pair) {
    const unsigned bits = reinterpret_cast<const unsigned&>(pair) ^ 0x80000000u;
    return reinterpret_cast<const __half2&>(bits);
  }
};

// A group as the page and as the table hold it.
struct GroupResult {
  format::GroupParameters parameters;
  Coder coder;
};

// format::group_parameters and GroupCoder by the hardware's conversions: a range's ends are fp16
// values, infinities saturate, an empty range stays empty, and no step overflows.
template <int Bits>
__device__ GroupResult group_result(__half2 low_and_negated_high, float margin) {
  constexpr float kTop = static_cast<float>(format::max_code(Bits));
  constexpr float kUnit = 1.f / (1 << Bits);
  const float2 range = __half22float2(saturate(low_and_negated_high));
  if (range.x != range.x || range.y != range.y) {
    return {{format::kFp16NaN, format::kFp16NaN}, {0.f, 0.f}};
  }
  if (range.x > -range.y) return {{}, {0.f, 0.f}};
  const float width = __fsub_rn(-range.y, range.x);
  const float low = __half2float(__float2half_rn(__fmaf_rn(width, margin, range.x)));
  const float zero = __fadd_rn(low, 0.f);  // no -0
  const float high = __fmaf_rn(-width, margin, -range.y);
  const float step = __fdiv_rn(__fsub_rn(high, zero), kTop);
  const __half scale = __float2half_rn(step > 0.f ? step : 0.f);
  const float length = __half2float(scale);
  const float inverse = length > 0.f ? __frcp_rn(length) : 0.f;
  return {{__half_as_ushort(scale), __half_as_ushort(__float2half_rn(zero))},
          {zero, __fmul_rn(inverse, kUnit)}};
}

// A block as the page and as the table hold it.
struct BlockResult {
  std::uint8_t parameters;  // its exponent
  Coder coder;
};

// format::block_exponent, block_parameters and GroupCoder, whose operations are all exact.
template <int Bits>
__device__ BlockResult block_result(__half2 low_and_negated_high) {
  const float2 range = __half22float2(saturate(low_and_negated_high));
  const bool has_nan = range.x != range.x || range.y != range.y;
  const int exponent = format::block_exponent({range.x, -range.y, has_nan}, Bits);
  const auto stored = static_cast<std::uint8_t>(exponent);
  if (exponent == format::kZeroBlock || exponent == format::kNaNBlock) return {stored, {0.f, 0.f}};
  const auto power_of_two = [](int e) { return __int_as_float((e + 127) << 23); };
  const float zero = __fmul_rn(-format::block_middle(Bits), power_of_two(exponent - 15));
  return {stored, {zero, power_of_two(15 - exponent - Bits)}};
}

// Ranges along tokens, one per run: range[token / 32][channel]; tokens before `first_token` count
// for nothing. A warp reads rows of 32 channel pairs.
template <int Threads, class Tile, class Table>
__device__ void find_channel_ranges(const Tile& sX, int tokens, int first_token, Table& table) {
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
template <int Threads, class Tile, class Table>
__device__ void find_token_ranges(const Tile& sX, int tokens, int group_channels, Table& table) {
  constexpr int kRuns = cute::size<1>(Tile{}.layout()) / kRunValues;
  const int group_log2 = log2_of(group_channels / kRunValues);  // in runs
  visit_quarters<Threads>(tokens, [&](const Quarter& quarter) {
    PairRange range;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      range.include(
          reinterpret_cast<const uint4&>(sX(quarter.token, quarter.channel + run * kRunValues)));
      const int group = run >> group_log2;
      if ((run + 1) >> group_log2 == group) continue;  // it goes on
      __half2 all = range.of_both();
      for (int distance = kQuarterTokens; distance < 32; distance *= 2) {
        all = __hmin2_nan(all, __shfl_xor_sync(0xffffffffu, all, distance));
      }
      if (quarter.channel == 0) table.range[group][quarter.token] = all;
      range = {};
    }
  });
}

// Calls visit(group, column, parameters) for all groups of a tile of `columns` columns, a power of
// two, and leaves the coders. A group's range is that of `rows` rows of the table, but for `margin`
// of its width at either end.
template <int Threads, int Bits, KAxis Axis, class Table, class Visit>
__device__ void visit_groups(Table& table, int groups, int columns, int rows, float margin,
                             const Visit& visit) {
  const int columns_log2 = log2_of(columns);
#pragma unroll 1
  for (int item = threadIdx.x; item < groups * columns; item += Threads) {
    const int group = item >> columns_log2, column = item & (columns - 1);
    __half2 range = table.range[group * rows][column];
#pragma unroll 1
    for (int row = 1; row < rows; ++row) {
      range = __hmin2_nan(range, table.range[group * rows + row][column]);
    }
    const auto result = [&] {
      if constexpr (Axis == KAxis::block) {
        return block_result<Bits>(range);
      } else {
        return group_result<Bits>(range, margin);
      }
    }();
    visit(group, column, result.parameters);
    table.coder[group][column] = result.coder;
  }
}

}  // namespace bitdecoding::quantize
