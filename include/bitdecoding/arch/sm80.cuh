// SPDX-License-Identifier: Apache-2.0
// PTX that CuTe has no name for, of sm_80 and newer.
#pragma once

#include <cstdint>

namespace bitdecoding::arch {

// The thread's place in its CTA and in its warp. Read anew wherever they are seldom needed: what a
// compiler derives from a value that it has, it keeps in registers all through the loops around.
__device__ inline int thread_id() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ inline int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The 8x8 matrix of 16-bit elements that a warp holds in MMA order, transposed.
__device__ inline std::uint32_t transpose_8x8(std::uint32_t pair) {
  std::uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// A barrier of whole warps, so many threads. `barrier`: 1 to 15, one for each such group of a CTA; 0
// is __syncthreads'.
template <int Threads>
__device__ void sync_threads(int barrier) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "n"(Threads) : "memory");
}

// Starts to bring a line of global memory into the L2 cache.
__device__ inline void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
}

// Adds 1 to a counter in global memory and returns what it was: what the thread wrote, or knew of,
// before is seen by whoever counts after it.
__device__ inline int count(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// The larger one; NaN if either is NaN, which fmaxf passes over.
__device__ inline float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// 2^x, to 2 ulp; -inf gives 0.
__device__ inline float exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// 1 / x, to 1 ulp.
__device__ inline float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// log2 x, x > 0.
__device__ inline float log2(float x) {
  float logarithm;
  asm("lg2.approx.f32 %0, %1;" : "=f"(logarithm) : "f"(x));
  return logarithm;
}

}  // namespace bitdecoding::arch
