// SPDX-License-Identifier: Apache-2.0
// The facts of the build as a Python dictionary, and which of its kernels decode chooses.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::python {

nanobind::dict build_facts();

std::string decode_kernel(const KvFormat& format, int columns, int compute_capability);

}  // namespace bitdecoding::python
