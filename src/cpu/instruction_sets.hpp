// SPDX-License-Identifier: Apache-2.0
// BITDECODING_CLONES compiles one function for several x86 instruction sets; the loader picks. Only
// such functions and what is forced inline into them leave the baseline, so no inline function of a
// header is ever compiled for a CPU that may be absent.
#pragma once

#include <cstdlib>  // defines __GLIBC__

// GCC on Linux has known the three levels since version 12, clang with them was tried from 22 on.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) && \
    (!defined(__clang__) || __clang_major__ >= 22)
#define BITDECODING_CLONES [[gnu::target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")]]
#else
#define BITDECODING_CLONES
#endif

#define BITDECODING_INLINE [[gnu::always_inline]] inline
