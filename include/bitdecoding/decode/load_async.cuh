// SPDX-License-Identifier: Apache-2.0
// Bytes into a stream's ring by cp.async (sm_80 and newer), 16 at a time, by all threads. Every
// turn commits one group, an empty one where nothing is left to load.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/decode/stream_threads.cuh"

namespace bitdecoding::decode {

__device__ inline void copy_piece(const std::uint8_t* from, std::uint8_t* to) {
  cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
      *reinterpret_cast<const cute::uint128_t*>(from), *reinterpret_cast<cute::uint128_t*>(to));
}

// 16 rows of K and of V, each to its padded place, by so many threads.
template <int HeadDim, int Threads>
__device__ void copy_zone(const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* to,
                          int thread) {
  constexpr int kRowBytes = 2 * HeadDim, kStride = zone_row_bytes(HeadDim);
  constexpr int kRowLanes = kRowBytes / 16, kRowsAtOnce = Threads / kRowLanes;
  const int row = thread / kRowLanes, piece = thread % kRowLanes * 16;
  k += row * kRowBytes + piece;
  v += row * kRowBytes + piece;
  to += row * kStride + piece;
#pragma unroll
  for (int i = 0; i < kZoneTokens; i += kRowsAtOnce) {
    copy_piece(k + i * kRowBytes, to + i * kStride);
    copy_piece(v + i * kRowBytes, to + (kZoneTokens + i) * kStride);
  }
}

template <class Threads>
class AsyncLoader {
 public:
  __device__ AsyncLoader(std::uint64_t*, int, int lane)
      : thread_(Threads::kWarps == 1 ? lane : Threads::thread()) {}

  __device__ void load_packed(int, const std::uint8_t* from, std::uint8_t* to, int bytes,
                              const std::uint8_t* group, std::uint8_t* group_to, int group_bytes) {
    copy(from, to, bytes);
    if (group != nullptr) copy(group, group_to, group_bytes);
  }

  template <int HeadDim>
  __device__ void load_zone(int, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* to) {
    copy_zone<HeadDim, Threads::kThreads>(k, v, to, Threads::thread());
  }

  __device__ void commit() { cute::cp_async_fence(); }

  __device__ void written() {}

  // Waits until all but the newest `stages - 2` groups are there, for every thread of the stream.
  __device__ void wait(int, int, int stages, bool) {
    switch (stages) {
      case 2: cute::cp_async_wait<0>(); break;
      case 3: cute::cp_async_wait<1>(); break;
      default: cute::cp_async_wait<2>(); break;
    }
    Threads::sync();
  }

 private:
  __device__ void copy(const std::uint8_t* from, std::uint8_t* to, int bytes) const {
    constexpr int kStep = Threads::kThreads * 16;
    for (int i = thread_ * 16; i < bytes; i += kStep) copy_piece(from + i, to + i);
  }

  int thread_;
};

}  // namespace bitdecoding::decode
