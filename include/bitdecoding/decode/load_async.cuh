// SPDX-License-Identifier: Apache-2.0
// Bytes into a warp's ring by cp.async (sm_80 and newer), 16 at a time, all lanes together. Every
// turn commits one group, an empty one where nothing is left to load.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "bitdecoding/decode/config.hpp"

namespace bitdecoding::decode {

class AsyncLoader {
 public:
  __device__ AsyncLoader(std::uint64_t*, int, int lane) : lane_(lane) {}

  __device__ void load_chunk(int, const std::uint8_t* from, std::uint8_t* to, int bytes,
                             const std::uint8_t* group, std::uint8_t* group_to, int group_bytes) {
    copy(from, to, bytes);
    if (group != nullptr) copy(group, group_to, group_bytes);
  }

  __device__ void load_zone(int, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* to,
                            int head_dim) {
    const int row_bytes = 2 * head_dim;
    const int pieces = row_bytes / 16;
    for (int i = lane_; i < 2 * kZoneTokens * pieces; i += 32) {
      const int row = i / pieces, piece = i % pieces;
      const std::uint8_t* rows = row < kZoneTokens ? k : v;
      copy_piece(rows + row % kZoneTokens * row_bytes + piece * 16,
                 to + row * zone_row_bytes(head_dim) + piece * 16);
    }
  }

  __device__ void commit() { cute::cp_async_fence(); }

  // Waits until all but the newest `stages - 2` groups are there, for every lane.
  __device__ void wait(int, int, int stages) {
    switch (stages) {
      case 2: cute::cp_async_wait<0>(); break;
      case 3: cute::cp_async_wait<1>(); break;
      default: cute::cp_async_wait<2>(); break;
    }
    __syncwarp();
  }

 private:
  __device__ static void copy_piece(const std::uint8_t* from, std::uint8_t* to) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
        *reinterpret_cast<const cute::uint128_t*>(from), *reinterpret_cast<cute::uint128_t*>(to));
  }
  __device__ void copy(const std::uint8_t* from, std::uint8_t* to, int bytes) const {
    for (int i = lane_ * 16; i < bytes; i += 32 * 16) copy_piece(from + i, to + i);
  }

  int lane_;
};

}  // namespace bitdecoding::decode
