// SPDX-License-Identifier: Apache-2.0
// The facts of the build as a Python dictionary.
#pragma once

#include <nanobind/nanobind.h>

namespace bitdecoding::python {

nanobind::dict build_facts();

}  // namespace bitdecoding::python
