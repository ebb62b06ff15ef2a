// SPDX-License-Identifier: Apache-2.0
// KvFormat as an immutable Python value.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::python {

namespace nb = nanobind;

KvFormat make_kv_format(const nb::kwargs& fields);
KvFormat parse(nb::handle name);
KvFormat recommended(nb::handle bits, nb::handle head_dim);
std::string axis_name(const KvFormat& format);
std::string repr(const KvFormat& format);
nb::tuple reduce(const KvFormat& format);  // pickle's (callable, arguments)

}  // namespace bitdecoding::python
