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

// A segment's queries, as load_query left them. Publishing them is left to the caller.
template <Wgmma S>
__device__ void begin_queries(Query<WarpColumns<S>>& query, const DecodeProblem& problem, int warp,
                              int lane, GroupStorage<S>& storage) {
  using Q = WarpColumns<S>;
  set_query<Q>(query.q, query.scale, problem, lane);
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

// Q' of a K group to operand B, piece by piece of 32 channels; also(piece, n tile, q words) sees what
// is read. shifted(q): what is multiplied instead of q. Returns whether a product overflowed fp16.
template <Wgmma S, class Vectors, class Shifted, class Also>
__device__ bool store_group(const Vectors& vectors, int warp, int lane, const Shifted& shifted,
                            const Also& also, GroupStorage<S>& storage) {
  using Q = WarpColumns<S>;
  __half2 largest = __float2half2_rn(0.f);
#pragma unroll
  for (int piece = 0; piece < S::tiles / 2; ++piece) {
    const uint4 scales = vectors(lane % 4, piece, 0);
#pragma unroll
    for (int n = 0; n < Q::n_tiles; ++n) {
      const uint4 q = *query_words<S>(storage, warp, lane, n, piece);
      also(piece, n, q);
      const auto store = [&](int tile, int pair, std::uint32_t q, std::uint32_t scale) {
        std::uint32_t product = multiply(shifted(q), scale);
        largest = __hmax2(largest, __habs2(as_half2(product)));
        const int field = k_field<S::page.k_bits>(tile);
        if (field != 0) {
          const float factor = position_factor<S::page.k_bits>(field);
          product = multiply(product, as_bits(__float2half2_rn(factor)));
        }
        storage.scaled[core_matrix<S>(warp * Q::n_tiles + n, 2 * tile + pair) / 4 + lane] = product;
      };
      store(2 * piece, 0, q.x, scales.x);
      store(2 * piece + 1, 0, q.y, scales.z);
      store(2 * piece, 1, q.z, scales.y);
      store(2 * piece + 1, 1, q.w, scales.w);
    }
  }
  // Infinity is the only one of their bit patterns with a carry out of its exponent.
  return ((as_bits(largest) + 0x04000400u) & 0x80008000u) != 0;
}

// Of q * zero over a K group's channels, by MMAs whose rows g hold the even pairs of a lane's
// zero-points and rows g + 8 the odd ones, as they lie in the page.
template <Wgmma S>
struct ZeroSums {
  static constexpr int kTiles = WarpColumns<S>::n_tiles;
  float even[kTiles][4] = {}, odd[kTiles][4] = {};

  __device__ void add(const uint4& zeros, int n, const uint4& q) {
    multiply(even[n], zeros, q.x, q.y);
    multiply(odd[n], zeros, q.z, q.w);
  }
  __device__ float operator()(int c) const { return even[c / 2][c % 2] + odd[c / 2][2 + c % 2]; }

 private:
  __device__ static void multiply(float (&d)[4], const uint4& a, std::uint32_t b0,
                                  std::uint32_t b1) {
    cute::SM80_16x8x16_F32F16F16F32_TN::fma(d[0], d[1], d[2], d[3], a.x, a.y, a.z, a.w, b0, b1,
                                            d[0], d[1], d[2], d[3]);
  }
};

// Q' of the channel-axis K group whose parameters the page begins with; publishing it is left to the
// caller.
template <Wgmma S, class Page>
__device__ void begin_channel_group(const Page& page, int warp, int lane,
                                    GroupStorage<S>& storage) {
  using Q = WarpColumns<S>;
  ColumnTensor<Q> scale, maximum;
#pragma unroll
  for (int c = 0; c < Q::lane_columns; ++c) {
    const int column = first_column<S>(warp) + Q::column(c, lane % 4);
    scale(c) = storage.scale[column];
    maximum(c) = storage.maximum[column];
  }
  const auto vectors = page.k_group_vectors(0);
  ZeroSums<S> zero_sums;
  const auto add_zeros = [&](int piece, int n, const uint4& q) {
    zero_sums.add(vectors(lane % 4, piece, 1), n, q);
  };
  const auto same = [](std::uint32_t q) { return q; };
  float unshrink = 1.f;
  if (__any_sync(0xffffffffu, store_group<S>(vectors, warp, lane, same, add_zeros, storage))) {
    constexpr std::uint32_t kShrink = 0x14001400u;  // 2^-10, twice: scales are above 1024
    const auto shrunk = [](std::uint32_t q) { return multiply(q, kShrink); };
    store_group<S>(vectors, warp, lane, shrunk, [](int, int, const uint4&) {}, storage);
    unshrink = 1024.f;
  }
  if (lane >= 4) return;
#pragma unroll
  for (int c = 0; c < Q::lane_columns; ++c) {
    const float bias = zero_sums(c) * scale(c);
    storage.bias[first_column<S>(warp) + Q::column(c, lane)] = bias;
    float* map = column_map<S>(storage, warp * Q::n_tiles, c, lane);
    map[0] = scale(c) * (kCodeFactor * unshrink);
    map[2] = bias + (kWeightExponent<S> - maximum(c));
  }
}

}  // namespace bitdecoding::decode
