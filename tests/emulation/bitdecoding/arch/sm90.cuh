// SPDX-License-Identifier: Apache-2.0
// Stands before the library's header of this name: the same functions on the emulated GPU.
#pragma once

#include "cuda_on_host.hpp"

namespace bitdecoding::arch {

inline bool any_of_warpgroup(int barrier, bool holds) {
  return emulation::any_of_group<emulation::kGroupThreads>(barrier, holds);
}

}  // namespace bitdecoding::arch
