// SPDX-License-Identifier: Apache-2.0
// 16 fp16 tokens of a zone: every warp has the scores of its quarter of the columns, by MMAs of its
// own; their weights become operand B for all. Zones come after the packed items of a segment.
#pragma once

#include "bitdecoding/decode/wgmma/values.cuh"

namespace bitdecoding::decode {

// p and weights of the warp's columns, and the factors by which what is there shrinks, in of_warps[0][0];
// not yet published. `sums`: of p, the lane's rows.
template <Wgmma S>
__device__ void weigh_zone(const std::uint8_t* rows, int end, int warp, int lane,
                           std::uint32_t* weights, GroupStorage<S>& storage,
                           ColumnTensor<WarpColumns<S>>& sums) {
  using Q = WarpColumns<S>;
  QueryTensor<Q> q;
  read_query<S>(storage, warp, lane, q);
  ScoreTensor<Q, 1> tSrS;
  score_zone<Q>(rows, q, lane, tSrS);
#pragma unroll
  for (int c = 0; c < Q::lane_columns; ++c) {
    const int column = first_column<S>(warp) + Q::column(c, lane % 4);
    tSrS(0, c, 0) *= storage.scale[column];
    tSrS(1, c, 0) *= storage.scale[column];
  }
  mask_scores<Q, 1>(0, end, lane, tSrS);
#pragma unroll
  for (int c = 0; c < Q::lane_columns; ++c) {
    const int column = first_column<S>(warp) + Q::column(c, lane % 4);
    float raised = fmaxf(tSrS(0, c, 0), tSrS(1, c, 0));
    for (int distance = 4; distance < 32; distance *= 2) {
      raised = fmaxf(raised, __shfl_xor_sync(0xffffffffu, raised, distance));
    }
    const float maximum = storage.maximum[column];
    raised = fmaxf(raised, maximum);
    __syncwarp();  // all lanes have read the maximum
    if (lane < 4) {
      storage.maximum[column] = raised;
      storage.of_warps[0][0][column] = arch::exp2(maximum - raised);
    }
    const float exponent = kWeightExponent<S> - raised;
    tSrS(0, c, 0) = arch::exp2(tSrS(0, c, 0) + exponent);
    tSrS(1, c, 0) = arch::exp2(tSrS(1, c, 0) + exponent);
    sums(c) = tSrS(0, c, 0) + tSrS(1, c, 0);
  }
#pragma unroll
  for (int i = 0; i < 2 * Q::n_tiles; ++i) {
    const int n = i / 2, row = i % 2;
    const __half2 pair = __floats2half2_rn(tSrS(row, 2 * n, 0), tSrS(row, 2 * n + 1, 0));
    weights[core_matrix<S>(warp * Q::n_tiles + n, row) / 4 + lane] =
        arch::transpose_8x8(as_bits(pair));
  }
}

// The rest, once the weights are published. `rows`: V's.
template <Wgmma S>
__device__ void add_zone_values(const std::uint8_t* rows, int end, int warp, int lane,
                                OperandB weights, const GroupStorage<S>& storage,
                                const ColumnTensor<WarpColumns<S>>& sums, GroupOutput<S>& output) {
  using Q = WarpColumns<S>;
#pragma unroll
  for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
    output.rescale(c, storage.of_warps[0][0][c / 2 * 8 + lane % 4 * 2 + c % 2]);
  }
#pragma unroll
  for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
    if (c / Q::lane_columns == warp) output.sums.p[c] += sums(c % Q::lane_columns);
  }
  FragmentA tOrV[GroupShape<S>::output_tiles];
  load_zone_values<S>(rows + warp * GroupShape<S>::warp_channels * 2, end, lane, tOrV);
  begin_values<1, S>(tOrV, weights, output);
  end_values<S>(output);
}

}  // namespace bitdecoding::decode
