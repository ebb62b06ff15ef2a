// SPDX-License-Identifier: Apache-2.0
// What a warpgroup keeps in shared memory beside its ring.
#pragma once

#include "bitdecoding/decode/halves/query.cuh"
#include "bitdecoding/decode/merge.cuh"
#include "bitdecoding/decode/wgmma/fragments.cuh"

namespace bitdecoding::decode {

template <Wgmma S>
struct alignas(kCoreBytes) GroupStorage {
  std::uint32_t scaled[S::columns * S::head_dim / 2];       // Q', operand B
  std::uint32_t weights[2][S::columns * kChunkTokens / 2];  // P', operand B, in turns
  uint4 query[S::columns * S::head_dim / 8];                // q, every lane's own words
  float4 sums[S::columns / 8][32 * kGroupWarps];            // see GroupSums
  // Of a pair of columns: factors, then offsets; 2^(sum * factor + offset) is a weight.
  float4 maps[S::columns / 2];
  float maximum[S::columns];                   // m, log2 domain
  float bias[S::columns];                      // per-channel K: the zero-points' share of a score
  float scale[S::columns];                     // see set_query
  float query_sum[S::columns];                 // per-token K: of q, in the log2 domain
  float of_warps[2][kGroupWarps][S::columns];  // on its way from a warp to the others
  int is_true[kGroupWarps];  // a warp's O no longer carries the codes' powers of two

  // The result of a segment takes the operands' place.
  __device__ Partial<S>& partial() { return *reinterpret_cast<Partial<S>*>(scaled); }
};

// What a stream has in shared memory in front of all rings.
template <DecodeConfig Config>
constexpr int stream_storage_bytes() {
  if constexpr (Config.product() == Product::wgmma) {
    return sizeof(GroupStorage<Shape<Config>>);
  } else {
    return 0;
  }
}

// A lane's q of its warp's columns, as operand B of a warp's MMAs: of an n tile and 32 channels the
// first pairs of both channel tiles, then the second ones.
template <Wgmma S>
__device__ uint4* query_words(GroupStorage<S>& storage, int warp, int lane, int n, int piece) {
  constexpr int kTiles = WarpColumns<S>::n_tiles;
  return storage.query + 32 * (kTiles * (S::tiles / 2 * warp + piece) + n) + lane;
}
template <Wgmma S>
__device__ void keep_query(const QueryTensor<WarpColumns<S>>& q, int warp, int lane,
                           GroupStorage<S>& storage) {
#pragma unroll
  for (int k = 0; k < S::tiles; k += 2) {
#pragma unroll
    for (int n = 0; n < WarpColumns<S>::n_tiles; ++n) {
      *query_words<S>(storage, warp, lane, n, k / 2) = {q(0, n, k), q(0, n, k + 1), q(1, n, k),
                                                        q(1, n, k + 1)};
    }
  }
}
template <Wgmma S>
__device__ void read_query(GroupStorage<S>& storage, int warp, int lane,
                           QueryTensor<WarpColumns<S>>& q) {
#pragma unroll
  for (int k = 0; k < S::tiles; k += 2) {
#pragma unroll
    for (int n = 0; n < WarpColumns<S>::n_tiles; ++n) {
      const uint4 four = *query_words<S>(storage, warp, lane, n, k / 2);
      q(0, n, k) = four.x;
      q(0, n, k + 1) = four.y;
      q(1, n, k) = four.z;
      q(1, n, k + 1) = four.w;
    }
  }
}

}  // namespace bitdecoding::decode
