// SPDX-License-Identifier: Apache-2.0
// Stands before the library's header of this name: the same functions on the emulated GPU.
#pragma once

#include <cmath>

#include "cuda_on_host.hpp"

namespace bitdecoding::arch {

inline int thread_id() { return emulation::machine()->thread(); }
inline int lane_id() { return emulation::machine()->lane(); }
inline std::uint32_t transpose_8x8(std::uint32_t pair) { return emulation::transpose_matrix(pair); }
template <int Threads>
void sync_threads(int barrier) {
  emulation::any_of_group<Threads>(barrier, false);
}
inline void prefetch_l2(const void*) {}

// Others run between the addition and what the thread does about it.
inline int count(int* counter) {
  const int before = (*counter)++;
  emulation::machine()->pass();
  return before;
}

inline float max_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b);
}

// Subnormal numbers count as 0.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float exp2(float x) { return flush(std::exp2(x)); }
inline float reciprocal(float x) { return flush(1.f / flush(x)); }
inline float log2(float x) { return std::log2(x); }

}  // namespace bitdecoding::arch
