// SPDX-License-Identifier: Apache-2.0
// DecodePlan: how a decode kernel is launched on a device. It depends on the format, the number of
// query columns and the device, never on lengths: made once, it serves every step and every graph.
#pragma once

#include <cstddef>

#include "bitdecoding/decode/config.hpp"

namespace bitdecoding::decode {

// Counters at the start of the workspace, one per CTA and query column: zero before the first
// launch; every launch leaves them zero.
inline constexpr int kWorkspaceCounters = 16384;
inline constexpr std::size_t kCounterBytes = kWorkspaceCounters * sizeof(int);

struct DecodePlan {
  KvFormat format;
  DecodeConfig config;
  const char* kernel = "";  // its name in the kernel table
  int device = 0;
  int ctas = 0;
  int warps = 0;          // per CTA
  int stages = 0;         // per stream
  int packed_chunks = 1;  // of a packed item
  int stage_bytes = 0;
  int smem_bytes = 0;
  std::size_t workspace_bytes = 0;  // counters, then partials
};

}  // namespace bitdecoding::decode
