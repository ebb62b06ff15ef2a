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
  // Of a pair of columns: factors, then offsets; 2^(sum * factor + offset) is a weight.
  float4 maps[S::columns / 2];
  float maximum[S::columns];                   // m, log2 domain
  float bias[S::columns];                      // per-channel K: the zero-points' share of a score
  float scale[S::columns];                     // see set_query
  float query_sum[S::columns];                 // per-token K: of q, in the log2 domain
  float of_warps[2][kGroupWarps][S::columns];  // on its way from a warp to the others

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

// The words of its columns' q that a lane has as operand B of a warp's MMA.
template <Wgmma S>
__device__ uint4* lane_words(GroupStorage<S>& storage, int warp, int lane) {
  static constexpr int kVectors = cute::size(QueryTensor<WarpColumns<S>>{}) / 4;
  return storage.query + 32 * kVectors * warp + lane;
}
template <Wgmma S>
__device__ void keep_query(const QueryTensor<WarpColumns<S>>& q, int warp, int lane,
                           GroupStorage<S>& storage) {
  uint4* words = lane_words<S>(storage, warp, lane);
#pragma unroll
  for (int i = 0; i < cute::size(q) / 4; ++i) {
    words[32 * i] = {q(4 * i), q(4 * i + 1), q(4 * i + 2), q(4 * i + 3)};
  }
}
template <Wgmma S>
__device__ void read_query(GroupStorage<S>& storage, int warp, int lane,
                           QueryTensor<WarpColumns<S>>& q) {
  const uint4* words = lane_words<S>(storage, warp, lane);
#pragma unroll
  for (int i = 0; i < cute::size(q) / 4; ++i) {
    const uint4 four = words[32 * i];
    q(4 * i) = four.x;
    q(4 * i + 1) = four.y;
    q(4 * i + 2) = four.z;
    q(4 * i + 3) = four.w;
  }
}

}  // namespace bitdecoding::decode
