// SPDX-License-Identifier: Apache-2.0
// One page of one head's K or V as an fp16 tile in shared memory: arrival from global memory in
// 16-byte pieces (bf16 becomes fp16), format::transform and division by token norms. A tile may
// hold infinities: they stand for 65504, and ranges see to it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm80.hpp>
#include <cute/tensor.hpp>

#include <cutlass/numeric_types.h>

#include "bitdecoding/format/kv_format.hpp"
#include "bitdecoding/format/quantizer.hpp"
#include "bitdecoding/format/rotation.cuh"
#include "bitdecoding/layout/page_config.hpp"
#include "bitdecoding/quantize/token_rows.hpp"

namespace bitdecoding::quantize {

using layout::kMaxPageTokens;

// Groups are whole runs of 32 values: tokens of one channel, or channels of one token.
inline constexpr int kRunValues = 32;

// (N,D). Rows are padded by 16 bytes: eight rows start in eight different 16-byte bank groups.
template <int HeadDim>
using TileLayout = cute::Layout<cute::Shape<cute::Int<kMaxPageTokens>, cute::Int<HeadDim>>,
                                cute::Stride<cute::Int<HeadDim + 8>, cute::_1>>;

template <int HeadDim>
__device__ auto make_tile(cutlass::half_t* smem) {
  return cute::make_tensor(cute::make_smem_ptr(smem), TileLayout<HeadDim>{});  // (N,D)
}

__device__ inline __half2 saturate(__half2 pair) {
  const __half2 top = __half2half2(__ushort_as_half(0x7bff));  // 65504
  return __hmin2_nan(__hmax2_nan(pair, __hneg2(top)), top);
}

struct Fp16FromFp16 {
  __device__ __half2 operator()(const unsigned& bits) const {
    return saturate(reinterpret_cast<const __half2&>(bits));
  }
};
struct Fp16FromBf16 {
  __device__ __half2 operator()(const unsigned& bits) const {
    return saturate(
        __float22half2_rn(__bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits))));
  }
};

// Eight values on their way into the cache.
template <class Convert>
__device__ uint4 arrive(uint4 eight, const Convert& convert) {
  for (unsigned* pair : {&eight.x, &eight.y, &eight.z, &eight.w}) {
    const __half2 arrived = convert(*pair);
    *pair = reinterpret_cast<const unsigned&>(arrived);
  }
  return eight;
}

// Copies `tokens` rows of (batch, head) from position `token` on into sX (N,D). fp16 goes as it is,
// all loads in flight together; bf16 goes through registers, a chunk of tokens at a time.
template <int Threads, class Tile>
__device__ void load_tile(const TokenRows& rows, int batch, int token, int head, int tokens,
                          const Tile& sX) {
  constexpr int kPieces = cute::size<1>(Tile{}.layout()) / 8;  // of 16 bytes in a row
  constexpr int kBatch = kPieces * kChunkTokens / Threads;     // pieces of a chunk per thread
  constexpr int kRowStep = Threads / kPieces;
  const int channel = threadIdx.x % kPieces * 8;
  const int first_row = threadIdx.x / kPieces;
  const auto* source = static_cast<const std::uint16_t*>(rows.data) +
                       rows.offset(batch, token + first_row, head) + channel;
  const std::int64_t step = kRowStep * rows.token_stride;
#pragma unroll 1
  for (int row = first_row; row < tokens; row += kChunkTokens) {
    if (rows.type == ElementType::f16) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i, source += step) {
        cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
            *reinterpret_cast<const cute::uint128_t*>(source),
            reinterpret_cast<cute::uint128_t&>(sX(row + i * kRowStep, channel)));
      }
    } else {
      uint4 pieces[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, source += step) {
        pieces[i] = __ldcs(reinterpret_cast<const uint4*>(source));  // read once
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        reinterpret_cast<uint4&>(sX(row + i * kRowStep, channel)) =
            arrive(pieces[i], Fp16FromBf16{});
      }
    }
  }
  cute::cp_async_wait<0>();
}

// How a warp reads whole tokens: lane 8q + n has quarter q of token n, which is the 16-byte pieces
// q, q + 4, ... of its row. Eight neighbours read eight rows: no two of them the same banks.
inline constexpr int kQuarterTokens = 8;
struct Quarter {
  int token, channel;  // of the first piece; the next one is 32 channels further

  __device__ explicit Quarter(int first_token)
      : token(first_token + threadIdx.x % kQuarterTokens), channel(threadIdx.x % 32 / 8 * 8) {}
};

// Calls visit(quarter) for the tokens of a tile, eight tokens a warp.
template <int Threads, class Visit>
__device__ void visit_quarters(int tokens, const Visit& visit) {
#pragma unroll 1
  for (int first = threadIdx.x / 32 * kQuarterTokens; first < tokens;
       first += Threads / 32 * kQuarterTokens) {
    visit(Quarter(first));
  }
}

// A tile's infinities count as 65504, which matters only where one computes with them.
__device__ inline __half2 finite(unsigned pair) {
  return saturate(reinterpret_cast<const __half2&>(pair));
}

// Eight fp16 of a tile, from x on, and back.
__device__ inline void widen_piece(const uint4& piece, float* x) {
#pragma unroll
  for (const unsigned pair : {piece.x, piece.y, piece.z, piece.w}) {
    const float2 values = __half22float2(finite(pair));
    *x++ = values.x;
    *x++ = values.y;
  }
}
__device__ inline uint4 narrow_piece(const float* x) {
  uint4 piece;
#pragma unroll
  for (unsigned* pair : {&piece.x, &piece.y, &piece.z, &piece.w}) {
    const __half2 values = saturate(__floats2half2_rn(x[0], x[1]));
    *pair = reinterpret_cast<const unsigned&>(values);
    x += 2;
  }
  return piece;
}
// An infinity of the mean stays one, and spoils the block.
__device__ inline void subtract_mean(const uint4& mean, float* x) {
#pragma unroll
  for (const unsigned pair : {mean.x, mean.y, mean.z, mean.w}) {
    const float2 values = __half22float2(reinterpret_cast<const __half2&>(pair));
    x[0] = __fsub_rn(x[0], values.x);
    x[1] = __fsub_rn(x[1], values.y);
    x += 2;
  }
}

// format::transform of the tokens of sX (N,D) from `first` on, in place. Eight neighbours have a
// token together, each of them one 16-byte piece of every 64 channels: more values a lane would take
// fewer shuffles, but registers that the kernels don't have.
template <int Threads, class Tile>
__device__ void transform_tile(const format::Arrival& arrival, int first, int tokens,
                               const Tile& sX) {
  constexpr int kTokens = Threads / 8, kPieceStep = 64;
  constexpr int kHeadDim = cute::size<1>(Tile{}.layout());
  constexpr int kChannels = format::longest_rotation(kHeadDim);  // at once
  constexpr int kPieces = kChannels / kPieceStep;
  const int thread = arch::thread_id();
#pragma unroll 1
  for (int token = max(first, 0) / kTokens * kTokens + thread / 8; token < tokens;
       token += kTokens) {
#pragma unroll 1
    for (int part = 0; part < kHeadDim / kChannels; ++part) {
      const int begin = part * kChannels + thread % 8 * 8;
      float x[8 * kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int channel = begin + i * kPieceStep;
        widen_piece(reinterpret_cast<const uint4&>(sX(token, channel)), x + 8 * i);
        if (arrival.mean == nullptr) continue;
        subtract_mean(reinterpret_cast<const uint4&>(arrival.mean[channel]), x + 8 * i);
      }
      format::rotate<8, kPieceStep / 8>(x, arrival.rotation);
      if (token < first) continue;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int channel = begin + i * kPieceStep;
        reinterpret_cast<uint4&>(sX(token, channel)) = narrow_piece(x + 8 * i);
      }
    }
  }
}

// fp16 norm of one token from the quarter's pieces: each lane has the sums c % 32 of its eight
// channels c, adds to them in rising order, and sums meet as the definition wants it. A square of
// an fp16 is exact in fp32, so fusing it with the sum changes nothing.
template <int Pieces>
__device__ cutlass::half_t token_norm(const uint4 (&pieces)[Pieces]) {
  float sums[8] = {};
#pragma unroll
  for (const uint4& piece : pieces) {
    int i = 0;
#pragma unroll
    for (const unsigned pair : {piece.x, piece.y, piece.z, piece.w}) {
      const float2 k = __half22float2(finite(pair));
      sums[i] = __fmaf_rn(k.x, k.x, sums[i]);
      sums[i + 1] = __fmaf_rn(k.y, k.y, sums[i + 1]);
      i += 2;
    }
  }
  for (int width = format::kNormSums / 2; width >= 8; width /= 2) {  // sum 8q + i is lane 8q + n's
    for (float& sum : sums) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, width));
  }
  for (int width = 4; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] = __fadd_rn(sums[i], sums[i + width]);
  }
  return cutlass::half_t::bitcast(format::fp16_from_float(__fsqrt_rn(sums[0])));
}

// Norm of every token of sX (N,D) to store(token, norm); then k becomes k / norm in place.
template <int Threads, class Tile, class Store>
__device__ void divide_by_norms(const Tile& sX, int tokens, const Store& store) {
  constexpr int kPieces = cute::size<1>(Tile{}.layout()) / kRunValues;
  visit_quarters<Threads>(tokens, [&](const Quarter& quarter) {
    uint4 pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      pieces[i] =
          reinterpret_cast<const uint4&>(sX(quarter.token, quarter.channel + i * kRunValues));
    }
    const cutlass::half_t norm = token_norm(pieces);
    if (quarter.channel == 0) store(quarter.token, norm);
    // format::normalized_key by the hardware's conversions: no quotient saturates.
    const float length = static_cast<float>(norm);
    const float inverse = length != 0.f ? __fdiv_rn(1.f, length) : 0.f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      for (unsigned* pair : {&pieces[i].x, &pieces[i].y, &pieces[i].z, &pieces[i].w}) {
        const float2 k = __half22float2(finite(*pair));
        const __half2 normalized =
            __floats2half2_rn(__fmul_rn(k.x, inverse), __fmul_rn(k.y, inverse));
        *pair = reinterpret_cast<const unsigned&>(normalized);
      }
      reinterpret_cast<uint4&>(sX(quarter.token, quarter.channel + i * kRunValues)) = pieces[i];
    }
  });
}

}  // namespace bitdecoding::quantize
