// SPDX-License-Identifier: Apache-2.0
// The queries of a segment and Q' of a K group: every warp makes those of its quarter of the columns,
// as a warp with a stream of its own does, and leaves them in shared memory as operand B.
#pragma once

#include "bitdecoding/decode/wgmma/storage.cuh"

namespace bitdecoding::decode {

template <Wgmma S>
__device__ int first_column(int warp) {
  return warp * WarpColumns<S>::columns;
}

// The affine map of column `column`.
template <Wgmma S>
__device__ void set_map(GroupStorage<S>& storage, int column, float factor, float offset) {
  auto* map = reinterpret_cast<float*>(&storage.maps[column / 2]);
  map[column % 2] = factor;
  map[column % 2 + 2] = offset;
}

template <Wgmma S>
__device__ void store_scaled(const QueryTensor<WarpColumns<S>>& scaled, int warp, int lane,
                             GroupStorage<S>& storage) {
  using Q = WarpColumns<S>;
#pragma unroll
  for (int k = 0; k < Q::tiles; ++k) {
#pragma unroll
    for (int i = 0; i < 2 * Q::n_tiles; ++i) {
      const int n = i / 2, pair = i % 2;
      storage.scaled[core_matrix<S>(warp * Q::n_tiles + n, 2 * k + pair) / 4 + lane] =
          scaled(pair, n, k);
    }
  }
}

// A segment's queries. Publishing them is left to the caller.
template <Wgmma S>
__device__ void begin_queries(const QueryBits<WarpColumns<S>>& bits, const DecodeProblem& problem,
                              int warp, int lane, GroupStorage<S>& storage) {
  using Q = WarpColumns<S>;
  Query<Q> query;
  set_query<Q>(query.q, query.scale, bits, problem.type, problem.softmax_scale, lane);
  keep_query<S>(query.q, warp, lane, storage);
  ColumnTensor<Q> sums;
  cute::clear(sums);
  if constexpr (S::page.k_axis == KAxis::token) {
    prepare_token_axis<Q>(query, lane);
    store_scaled<S>(query.scaled, warp, lane, storage);
#pragma unroll
    for (int pair = 0; pair < Q::tiles / 2; ++pair) {
      const ColumnTensor<Q> sum = sum_query<Q>(query.q, pair);
#pragma unroll
      for (int c = 0; c < Q::lane_columns; ++c) sums(c) += sum(c);
    }
  }
  if (lane >= 4) return;
#pragma unroll
  for (int c = 0; c < Q::lane_columns; ++c) {
    const int column = first_column<S>(warp) + Q::column(c, lane);
    storage.maximum[column] = kMaximumFloor;
    storage.scale[column] = query.scale(c);
    storage.bias[column] = 0.f;
    storage.query_sum[column] = sums(c) * query.scale(c);
    set_map<S>(storage, column, query.scale(c) * kCodeFactor, kWeightExponent<S> - kMaximumFloor);
  }
}

// Q' of the channel-axis K group whose parameters the page begins with, published.
template <Wgmma S, class Page>
__device__ void begin_channel_group(const Page& page, int warp, int lane,
                                    GroupStorage<S>& storage) {
  using Q = WarpColumns<S>;
  Query<Q> query;
  read_query<S>(storage, warp, lane, query.q);
#pragma unroll
  for (int c = 0; c < Q::lane_columns; ++c) {
    query.scale(c) = storage.scale[first_column<S>(warp) + Q::column(c, lane % 4)];
  }
  ColumnTensor<Q> factor, bias;
  apply_channel_group<Q>(query, page.k_group_vectors(0), lane, factor, bias);
  store_scaled<S>(query.scaled, warp, lane, storage);
  if (lane < 4) {
#pragma unroll
    for (int c = 0; c < Q::lane_columns; ++c) {
      const int column = first_column<S>(warp) + Q::column(c, lane);
      storage.bias[column] = bias(c);
      set_map<S>(storage, column, factor(c),
                 bias(c) + (kWeightExponent<S> - storage.maximum[column]));
    }
  }
}

}  // namespace bitdecoding::decode
