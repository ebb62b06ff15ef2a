// SPDX-License-Identifier: Apache-2.0
// The threads of one stream: a warp, two, or, where products are wgmma's, a warpgroup. All warps
// of a stream walk through its items alike, each with storage of its own; one issues bulk copies.
#pragma once

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/arch/sm90.cuh"
#include "bitdecoding/decode/config.hpp"

namespace bitdecoding::decode {

template <DecodeConfig Config>
struct StreamThreads {
  static constexpr int kWarps = stream_warps(Config);
  static constexpr int kThreads = 32 * kWarps;

  // The stream of the CTA; the thread and the warp of the stream.
  static __device__ int stream() { return arch::thread_id() / kThreads; }
  static __device__ int thread() {
    return kWarps == 1 ? arch::lane_id() : arch::thread_id() & (kThreads - 1);
  }
  static __device__ int warp() { return kWarps == 1 ? 0 : arch::thread_id() >> 5 & (kWarps - 1); }

  static __device__ int barrier() { return 1 + stream(); }  // of several warps

  static __device__ void sync() {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      arch::sync_threads<kThreads>(barrier());
    }
  }
  // sync(), and whether it holds for any thread.
  static __device__ bool any(bool holds) {
    if constexpr (kWarps == 1) {
      return __any_sync(0xffffffffu, holds) != 0;
    } else {
      return arch::any_of_warpgroup(barrier(), holds);
    }
  }
};

}  // namespace bitdecoding::decode
