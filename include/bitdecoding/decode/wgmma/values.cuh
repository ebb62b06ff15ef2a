// SPDX-License-Identifier: Apache-2.0
// A chunk's weights, in shared memory as operand B, and O^T += V^T P'^T by a warpgroup. p and m are
// those of halves/values.cuh; m is one per column for all warps, and rises where p of a token
// exceeds 2^(15 - e), 2^e above the token's V scale: P' = p * scale doesn't overflow fp16.
#pragma once

#include "bitdecoding/decode/online_softmax.cuh"
#include "bitdecoding/decode/values.cuh"
#include "bitdecoding/decode/wgmma/scores.cuh"

namespace bitdecoding::decode {

// Of a lane's tokens.
template <Wgmma S>
struct GroupSums {
  static constexpr int kFours = GroupShape<S>::lane_columns / 4;
  float p[GroupShape<S>::lane_columns];
  float zero[GroupShape<S>::lane_columns];  // of p * zero

  // A copy in shared memory, for when a chunk's weights turn out too large.
  __device__ void save(GroupStorage<S>& storage, int thread) const {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      storage.sums[i][thread] = {p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
      storage.sums[kFours + i][thread] = {zero[4 * i], zero[4 * i + 1], zero[4 * i + 2],
                                          zero[4 * i + 3]};
    }
  }
  __device__ void restore(const GroupStorage<S>& storage, int thread) {
#pragma unroll
    for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
      p[c] = reinterpret_cast<const float*>(&storage.sums[c / 4][thread])[c % 4];
      zero[c] = reinterpret_cast<const float*>(&storage.sums[kFours + c / 4][thread])[c % 4];
    }
  }
};

template <Wgmma S>
struct GroupOutput {
  GroupTile<S> tOrO[GroupShape<S>::output_tiles];
  GroupSums<S> sums;

  __device__ void reset() {
#pragma unroll
    for (GroupTile<S>& tile : tOrO) {
#pragma unroll
      for (float& d : tile.d) d = 0.f;
    }
#pragma unroll
    for (int c = 0; c < GroupShape<S>::lane_columns; ++c) sums.p[c] = sums.zero[c] = 0.f;
  }
  __device__ void rescale(int c, float factor) {
#pragma unroll
    for (GroupTile<S>& tile : tOrO) {
      tile.d[c / 2 * 4 + c % 2] *= factor;
      tile.d[c / 2 * 4 + c % 2 + 2] *= factor;
    }
    sums.p[c] *= factor;
    sums.zero[c] *= factor;
  }
  // Takes the codes' powers of two from tOrO.
  __device__ void make_true() {
#pragma unroll
    for (int i = 0; i < GroupShape<S>::output_tiles; ++i) {
#pragma unroll
      for (int d = 0; d < GroupShape<S>::accumulators; ++d) {
        const int field = 2 * (i % S::V::tiles_per_word) + d / 2 % 2;
        tOrO[i].d[d] *= kCodeFactor * position_factor<S::page.v_bits>(field);
      }
    }
  }
};

// An exponent e with the scale below 2^e, in [-14, 16].
__device__ inline int scale_exponent(float scale) {
  return min(max((__float_as_int(scale) >> 23) - 126, -14), 16);
}

// Where a lane's row of the first columns' weights lies: lane 8i + r has row r of the core matrix i of
// (n, k), (n, k + 1), (n + 1, k), (n + 1, k + 1).
template <Wgmma S>
__device__ int weights_row(int warp, int lane) {
  return core_matrix<S>(lane >> 4, 2 * warp + (lane >> 3 & 1)) / 4 + (lane & 7) * 4;
}

// What a lane knows of its columns of four tiles: see GroupStorage.
template <Wgmma S>
struct ColumnMaps {
  static constexpr int kTiles = 4;
  static constexpr bool kPerToken = S::page.k_axis == KAxis::token;
  float4 map[kTiles];
  float2 query_sum[kTiles] = {};

  ColumnMaps() = default;
  __device__ ColumnMaps(const GroupStorage<S>& storage, int first, int lane) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      map[n] = storage.maps[4 * (first + n) + (lane & 3)];
      if constexpr (kPerToken) {
        const float* sums = &storage.query_sum[8 * (first + n) + (lane & 3) * 2];
        query_sum[n] = *reinterpret_cast<const float2*>(sums);
      }
    }
  }
};

// A chunk's raw sums to p, which join `sums`, and to weights, from the lane's row on: written, not yet
// published. Returns whether a p is too large.
template <Wgmma S, class Axis>
__device__ bool weigh_group(const GroupStorage<S>& storage, const Axis& axis, const TokenPair& v,
                            int lane, GroupTile<S>& tSrS, GroupSums<S>& sums,
                            std::uint32_t* weights) {
  float top = 0.f;
  ColumnMaps<S> maps;
#pragma unroll
  for (int n = 0; n < GroupShape<S>::n_tiles; n += 2) {
    constexpr int kMapTiles = ColumnMaps<S>::kTiles;
    if (n % kMapTiles == 0) maps = ColumnMaps<S>(storage, n, lane);
    std::uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* s = tSrS.d + 4 * (n + i);
      const float4 map = maps.map[(n + i) % kMapTiles];
      const float2 query_sum = maps.query_sum[(n + i) % kMapTiles];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        s[2 * row] =
            arch::exp2(axis.sum(s[2 * row], row) * map.x + axis.offset(map.z, query_sum.x, row));
        s[2 * row + 1] = arch::exp2(axis.sum(s[2 * row + 1], row) * map.y +
                                    axis.offset(map.w, query_sum.y, row));
        pairs[2 * i + row] =
            as_bits(__floats2half2_rn(s[2 * row] * v.scale[row], s[2 * row + 1] * v.scale[row]));
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 2 * (n + i) + e;
        const float sum = s[e] + s[2 + e];
        top = fmaxf(top, sum);
        sums.p[c] += sum;
        sums.zero[c] = s[e] * v.zero[0] + (s[2 + e] * v.zero[1] + sums.zero[c]);
      }
    }
    cute::SM90_U16x8_STSM_T::copy(
        pairs[0], pairs[1], pairs[2], pairs[3],
        *reinterpret_cast<cute::uint128_t*>(weights + core_matrix<S>(n, 0) / 4));
  }
  return top > power_of_two(15 - scale_exponent(fmaxf(v.scale[0], v.scale[1])));
}

// Raises m to the chunks' largest score + e of every column. The last of its barriers is the caller's.
template <int Chunks, Wgmma S, class Threads, class Axis>
__device__ void raise_group_maximum(const LaneTokens<Axis> (&tokens)[Chunks],
                                    const GroupTile<S> (&tSrS)[Chunks], int warp, int lane,
                                    GroupStorage<S>& storage, GroupOutput<S>& output) {
  const auto column_of = [&](int c) { return c / 2 * 8 + (lane & 3) * 2 + c % 2; };
#pragma unroll
  for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
    const int column = column_of(c);
    const float factor = *column_map<S>(storage, 0, c, lane);
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2 * Chunks; ++i) {
      const int row = i % 2;
      const LaneTokens<Axis>& of = tokens[i / 2];
      const float bias = of.axis.offset(storage.bias[column], storage.query_sum[column], row);
      const float s = tSrS[i / 2].d[c / 2 * 4 + 2 * row + c % 2];
      const auto e = static_cast<float>(scale_exponent(of.v.scale[row]));
      top = fmaxf(top, of.axis.sum(s, row) * factor + bias + e);
    }
    for (int distance = 4; distance < 32; distance *= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
    }
    if (lane < 4) storage.of_warps[0][warp][column] = top;
  }
  Threads::sync();
  float raised[GroupShape<S>::lane_columns];
#pragma unroll
  for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
    const int column = column_of(c);
    const float maximum = storage.maximum[column];
    raised[c] = maximum;
#pragma unroll
    for (int i = 0; i < kGroupWarps; ++i) {
      raised[c] = fmaxf(raised[c], storage.of_warps[0][i][column]);
    }
    output.rescale(c, arch::exp2(maximum - raised[c]));
  }
  Threads::sync();
  if (warp != 0 || lane >= 4) return;
#pragma unroll
  for (int c = 0; c < GroupShape<S>::lane_columns; ++c) {
    const int column = column_of(c);
    storage.maximum[column] = raised[c];
    column_map<S>(storage, 0, c, lane)[2] = storage.bias[column] + (kWeightExponent<S> - raised[c]);
  }
}

// A lane's V words of a chunk, of its warp's quarter of the channels: (word of a block, block).
template <Wgmma S>
struct ValueWords {
  static constexpr int kWords = S::V::v_part_words * kChunkBlocks;
  std::uint32_t word[kWords];

  ValueWords() = default;
  template <class Page>
  __device__ ValueWords(const Page& page, int warp, int lane) {
    const auto units = page.v_units(0);
    const int part = warp * S::V::v_parts / kGroupWarps;
#pragma unroll
    for (int unit = 0; unit < S::V::v_units; ++unit) {
      const auto piece = units(lane, unit, part);
#pragma unroll
      for (int i = 0; i < S::V::v_unit_words; ++i)
        word[unit * S::V::v_unit_words + i] = piece.word[i];
    }
    // Two warps share a part's words: the second has the upper fields.
    if constexpr (S::V::v_parts < kGroupWarps) {
      static_assert(2 * S::V::v_parts == kGroupWarps && S::V::tiles_per_word == 2);
      const int shift = warp % 2 * 2 * S::page.v_bits;
      for (std::uint32_t& w : word) w >>= shift;
    }
  }
  // Of tile i of the output.
  __device__ FragmentA fragment(int i, int block) const {
    const int column = i / S::V::tiles_per_word;
    return v_halves<S::page.v_bits>(word[block * S::V::v_part_words + column],
                                    i % S::V::tiles_per_word);
  }
};

// O^T += V^T P'^T of chunks, begun in two halves, as ScorePipe does.
template <Wgmma S>
struct ValuePipe {
  static constexpr int kTiles = GroupShape<S>::output_tiles;
  static constexpr int kBlocks = kChunkBlocks / 2;
  static constexpr int kSets = S::columns == 32 ? 2 : 4;
  FragmentA tOrV[kSets][kBlocks * kTiles];

  __device__ void begin(const ValueWords<S>& words, OperandB weights, int chunk,
                        GroupOutput<S>& output) {
    if (chunk == 0) fence<S>(output.tOrO);
    cute::warpgroup_fence_operand(weights.low);  // descriptors are made here, not in front of loops
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int turn = 2 * chunk + half;
      if (turn >= kSets) cute::warpgroup_wait<kSets - 1>();
      FragmentA(&a)[kBlocks * kTiles] = tOrV[turn % kSets];
#pragma unroll
      for (int i = 0; i < kBlocks * kTiles; ++i) {
        a[i] = words.fragment(i % kTiles, half * kBlocks + i / kTiles);
      }
      fence(a);
      cute::warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < kBlocks * kTiles; ++i) {
        multiply_group<S>(output.tOrO[i % kTiles], a[i],
                          descriptor_b<S>(weights, half * kBlocks + i / kTiles), true);
      }
      cute::warpgroup_commit_batch();
    }
  }
};

// O^T += A times Blocks blocks of weights, begun: `tOrV` of (tile, block), tiles fastest.
template <int Blocks, Wgmma S>
__device__ void begin_values(FragmentA (&tOrV)[Blocks * GroupShape<S>::output_tiles],
                             OperandB weights, GroupOutput<S>& output) {
  constexpr int kTiles = GroupShape<S>::output_tiles;
  fence<S>(output.tOrO);
  fence(tOrV);
  cute::warpgroup_fence_operand(weights.low);  // descriptors are made here, not in front of loops
  cute::warpgroup_arrive();
#pragma unroll
  for (int block = 0; block < Blocks; ++block) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      multiply_group<S>(output.tOrO[i], tOrV[kTiles * block + i], descriptor_b<S>(weights, block),
                        true);
    }
  }
  cute::warpgroup_commit_batch();
}
// Whatever was begun is there.
template <Wgmma S>
__device__ void end_values(GroupOutput<S>& output) {
  cute::warpgroup_wait<0>();
  fence<S>(output.tOrO);
}

}  // namespace bitdecoding::decode
