// SPDX-License-Identifier: Apache-2.0
// The tokens of one head's K or V in a sequence that grows, by position: old ones lie in the ring,
// fp16, new ones in the input. They reach a tile in shared memory by cp.async, a whole page in
// flight at once.
#pragma once

#include <cuda_runtime.h>

#include <cute/arch/copy_sm80.hpp>

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/quantize/growth.hpp"
#include "bitdecoding/quantize/token_rows.hpp"
#include "bitdecoding/quantize/token_tile.cuh"

namespace bitdecoding::quantize {

// Eight values of a new token as the cache holds them.
__device__ inline uint4 arrive(uint4 eight, ElementType type) {
  return type == ElementType::f16 ? arrive(eight, Fp16FromFp16{}) : arrive(eight, Fp16FromBf16{});
}

// format::transform of eight such values, of whose row neighbouring lanes have the others.
template <int HeadDim>
__device__ uint4 transform_piece(const uint4& eight, const uint4& mean, int rotation) {
  float x[8];
  widen_piece(eight, x);
  subtract_mean(mean, x);
  format::rotate<8, HeadDim / 8>(x, rotation);
  return narrow_piece(x);
}

// Called by all `Threads` of a CTA; a thread moves 16-byte pieces of one column.
template <int HeadDim, int Threads>
class HeadTokens {
 public:
  // input: channel 0 of position old_length; side: (F + T, D) fp16.
  __device__ HeadTokens(const PagedKvCache& c, int old_length, const TokenRows& rows,
                        const std::uint16_t* input, const std::uint16_t* side)
      : keep_first_(c.keep_first),
        tail_tokens_(c.tail_tokens),
        old_length_(old_length),
        type_(rows.type),
        token_stride_(rows.token_stride),
        input_(input),
        side_(side) {}

  // Begins to copy positions [begin, begin + tokens) to sX (N,D), as they are in memory.
  template <class Tile>
  __device__ void begin_tile(int begin, int tokens, const Tile& sX) const {
    const int channel = threadIdx.x % kPieces * 8;
    const int first_row = threadIdx.x / kPieces;
    int position = begin + first_row;
    int ring_row = position % tail_tokens_;
    const std::uint16_t* ring = tail_row(ring_row) + channel;
    const std::uint16_t* input = new_row(position) + channel;
#pragma unroll 2
    for (int row = first_row; row < tokens; row += kRowStep) {
      const std::uint16_t* from = position < old_length_ ? ring : input;
      cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
          reinterpret_cast<const cute::uint128_t&>(*from),
          reinterpret_cast<cute::uint128_t&>(sX(row, channel)));
      position += kRowStep;
      input += kRowStep * token_stride_;
      ring += kRowStep * HeadDim;
      ring_row += kRowStep;  // a ring has at least a page of rows
      if (ring_row >= tail_tokens_) {
        ring_row -= tail_tokens_;
        ring -= static_cast<std::int64_t>(tail_tokens_) * HeadDim;
      }
    }
    cute::cp_async_fence();
  }
  // Ends it: new tokens become fp16 in place. A thread sees the pieces that it has copied itself;
  // all others', behind the next barrier.
  template <class Tile>
  __device__ void end_tile(int begin, int tokens, const Tile& sX) const {
    cute::cp_async_wait<0>();
    if (begin + tokens <= old_length_) return;
    const int channel = threadIdx.x % kPieces * 8;
#pragma unroll 1
    for (int row = threadIdx.x / kPieces; row < tokens; row += kRowStep) {
      auto& eight = reinterpret_cast<uint4&>(sX(row, channel));
      if (begin + row >= old_length_) eight = arrive(eight, type_);
    }
  }

  // Begins to bring positions [begin, begin + tokens) to the L2 cache.
  __device__ void prefetch(int begin, int tokens) const {
    constexpr int kLine = 64;  // elements
    constexpr int kLines = HeadDim / kLine;
#pragma unroll 1
    for (int line = threadIdx.x; line < tokens * kLines; line += Threads) {
      const int position = begin + line / kLines;
      const std::uint16_t* from =
          position < old_length_ ? tail_row(position % tail_tokens_) : new_row(position);
      arch::prefetch_l2(from + line % kLines * kLine);
    }
  }

 private:
  static constexpr int kPieces = HeadDim / 8;  // of 16 bytes in a row
  static constexpr int kRowStep = Threads / kPieces;
  static_assert(kRowStep <= 64, "begin_tile goes around a ring once at most in a step");

  __device__ const std::uint16_t* tail_row(int row) const {
    return side_ + static_cast<std::int64_t>(keep_first_ + row) * HeadDim;
  }
  __device__ const std::uint16_t* new_row(int position) const {
    return input_ + (position - old_length_) * token_stride_;
  }

  int keep_first_, tail_tokens_, old_length_;
  ElementType type_;
  std::int64_t token_stride_;
  const std::uint16_t* input_;
  const std::uint16_t* side_;
};

}  // namespace bitdecoding::quantize
