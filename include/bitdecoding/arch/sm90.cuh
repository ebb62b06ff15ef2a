// SPDX-License-Identifier: Apache-2.0
// PTX that CuTe has no name for, of sm_90.
#pragma once

namespace bitdecoding::arch {

// sync_threads of a warpgroup, and whether it holds for any of its threads.
__device__ inline bool any_of_warpgroup(int barrier, bool holds) {
  int any;
  asm volatile(
      "{\n\t.reg .pred mine, all;\n\t"
      "setp.ne.s32 mine, %2, 0;\n\t"
      "bar.red.or.pred all, %1, 128, mine;\n\t"
      "selp.s32 %0, 1, 0, all;\n\t}"
      : "=r"(any)
      : "r"(barrier), "r"(static_cast<int>(holds))
      : "memory");
  return any != 0;
}

}  // namespace bitdecoding::arch
