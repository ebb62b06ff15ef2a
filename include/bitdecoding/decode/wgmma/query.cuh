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

// Factor and, two further, offset of a lane's column c, in tiles of 8 columns from `tile` on.
template <Wgmma S>
__device__ float* column_map(GroupStorage<S>& storage, int tile, int c, int lane) {
  return reinterpret_cast<float*>(&storage.maps[4 * (tile + c / 2) + (lane & 3)]) + c % 2;
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
    QuerySums<Q> parts;
    sum_query<Q>(query.q, parts);
#pragma unroll
    for (const ColumnTensor<Q>& part : parts) {
#pragma unroll
      for (int c = 0; c < Q::lane_columns; ++c) sums(c) += part(c);
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
    float* map = column_map<S>(storage, warp * Q::n_tiles, c, lane);
    map[0] = query.scale(c) * kCodeFactor;
    map[2] = kWeightExponent<S> - kMaximumFloor;
  }
}

// Q' of the channel-axis K group whose parameters the page begins with, published.
template <Wgmma S, class Page>
__device__ void begin_channel_group(const Page& page, int warp, int lane,
                                    GroupStorage<S>& storage) {
  using Q = WarpColumns<S>;
  Query<Q> query;
  read_query<S>(storage, warp, lane, query.q);
  ColumnTensor<Q> maximum;
#pragma unroll
  for (int c = 0; c < Q::lane_columns; ++c) {
    const int column = first_column<S>(warp) + Q::column(c, lane % 4);
    query.scale(c) = storage.scale[column];
    maximum(c) = storage.maximum[column];
  }
  ColumnTensor<Q> factor, bias;
  apply_channel_group<Q>(query, page.k_group_vectors(0), lane, factor, bias);
  store_scaled<S>(query.scaled, warp, lane, storage);
  if (lane < 4) {
#pragma unroll
    for (int c = 0; c < Q::lane_columns; ++c) {
      const int column = first_column<S>(warp) + Q::column(c, lane);
      storage.bias[column] = bias(c);
      float* map = column_map<S>(storage, warp * Q::n_tiles, c, lane);
      map[0] = factor(c);
      map[2] = bias(c) + (kWeightExponent<S> - maximum(c));
    }
  }
}

}  // namespace bitdecoding::decode
