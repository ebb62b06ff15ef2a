// SPDX-License-Identifier: Apache-2.0
// One page of one head's K or V as an fp16 tile in shared memory: arrival from global memory in
// 16-byte pieces (bf16 becomes fp16, magnitudes saturate at 65504) and division by token norms.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/tensor.hpp>

#include <cutlass/numeric_types.h>

#include "bitdecoding/format/kv_format.hpp"
#include "bitdecoding/format/quantizer.hpp"
#include "bitdecoding/layout/page_config.hpp"
#include "bitdecoding/quantize/token_rows.hpp"

namespace bitdecoding::quantize {

using layout::kMaxPageTokens;

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

// Copies `tokens` rows of (batch, head) from position `token` on into sX (N,D), a chunk at a time:
// all loads of a chunk are in flight together.
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
#pragma unroll 1
  for (int row = first_row; row < tokens; row += kChunkTokens) {
    uint4 pieces[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      pieces[i] = __ldcs(reinterpret_cast<const uint4*>(source));  // read once: don't keep in L2
      source += kRowStep * rows.token_stride;
    }
    const auto store = [&](const auto& convert) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        reinterpret_cast<uint4&>(sX(row + i * kRowStep, channel)) = arrive(pieces[i], convert);
      }
    };
    if (rows.type == ElementType::f16) {
      store(Fp16FromFp16{});
    } else {
      store(Fp16FromBf16{});
    }
  }
}

// Norm of every token of sX (N,D) to store(token, norm); then k becomes k / norm in place.
// A warp takes a token: lane i adds the squares of channels i, i + 32, ... as the definition does.
template <int Threads, class Tile, class Store>
__device__ void divide_by_norms(const Tile& sX, int tokens, const Store& store) {
  constexpr int kLanes = format::kNormSums;
  constexpr int kValues = cute::size<1>(Tile{}.layout()) / kLanes;
  const int lane = threadIdx.x % kLanes;
  for (int token = threadIdx.x / kLanes; token < tokens; token += Threads / kLanes) {
    float sum = 0.f;
    for (int i = 0; i < kValues; ++i) {
      const float k = static_cast<float>(sX(token, lane + i * kLanes));
      sum = __fadd_rn(sum, __fmul_rn(k, k));
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, width));
    }
    const cutlass::half_t norm = cutlass::half_t::bitcast(format::fp16_from_float(__fsqrt_rn(sum)));
    if (lane == 0) store(token, norm);
    // format::normalized_key by the hardware's conversions: no quotient saturates.
    const float length = static_cast<float>(norm);
    const float inverse = length != 0.f ? __fdiv_rn(1.f, length) : 0.f;
    for (int i = 0; i < kValues; ++i) {
      cutlass::half_t& k = sX(token, lane + i * kLanes);
      k = cutlass::half_t(__fmul_rn(static_cast<float>(k), inverse));
    }
  }
}

}  // namespace bitdecoding::quantize
