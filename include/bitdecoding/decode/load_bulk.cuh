// SPDX-License-Identifier: Apache-2.0
// Bytes into a warp's ring by the bulk copy engine (sm_90): a packed item is one copy; what has
// landed completes the phase of an mbarrier.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include <cutlass/arch/barrier.h>

#include "bitdecoding/decode/load_async.cuh"
#include "bitdecoding/decode/stream_threads.cuh"

namespace bitdecoding::decode {

template <class Threads>
class BulkLoader {
 public:
  // One barrier per stage, in shared memory, for all warps of the stream.
  __device__ BulkLoader(std::uint64_t* barriers, int stages, int lane)
      : barriers_(barriers), lane_(lane) {
    if (Threads::warp() == 0 && lane < stages) {
      cute::initialize_barrier(barriers[lane], 1);
      cutlass::arch::fence_barrier_init();
    }
    Threads::sync();
  }

  // `group` (or nullptr): parameters of a K group that begins in an earlier chunk.
  __device__ void load_packed(int stage, const std::uint8_t* from, std::uint8_t* to, int bytes,
                              const std::uint8_t* group, std::uint8_t* group_to, int group_bytes) {
    if (Threads::warp() != 0) return;
    if (!cute::elect_one_sync()) return;  // the compiler knows it for one lane: no loop over lanes
    const int all = bytes + (group == nullptr ? 0 : group_bytes);
    cute::set_barrier_transaction_bytes(barriers_[stage], all);
    cute::SM90_BULK_COPY_G2S::copy(from, &barriers_[stage], to, bytes);
    if (group != nullptr) {
      cute::SM90_BULK_COPY_G2S::copy(group, &barriers_[stage], group_to, group_bytes);
    }
  }

  // By all threads in pieces of 16 bytes, since rows go to padded places: a bulk copy per row costs
  // more instructions. The barrier's phase completes at once; `wait` waits for the pieces.
  template <int HeadDim>
  __device__ void load_zone(int stage, const std::uint8_t* k, const std::uint8_t* v,
                            std::uint8_t* to) {
    copy_zone<HeadDim, Threads::kThreads>(k, v, to, Threads::thread());
    if (Threads::warp() == 0 && lane_ == 0) cute::arrive_barrier(barriers_[stage]);
  }

  __device__ void commit() {}

  // The copy engine must not overtake the stream's own writes to a stage.
  __device__ void written() { cutlass::arch::fence_view_async_shared(); }

  // `is_zone`: of other warps' pieces, too.
  __device__ void wait(int stage, int phase, int, bool is_zone) {
    cute::wait_barrier(barriers_[stage], phase);
    if (Threads::kWarps > 1 && !is_zone) return;
    cute::cp_async_wait<0>();  // every thread its pieces of zones
    Threads::sync();
  }

 private:
  std::uint64_t* barriers_;
  int lane_;
};

}  // namespace bitdecoding::decode
