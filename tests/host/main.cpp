// SPDX-License-Identifier: Apache-2.0
// The main function of every host test program.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest.h>
