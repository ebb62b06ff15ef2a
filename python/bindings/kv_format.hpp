// SPDX-License-Identifier: Apache-2.0
// KvFormat as an immutable Python value.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <string_view>

#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::python {

namespace nb = nanobind;

KvFormat make_kv_format(int k_bits, int v_bits, std::string_view k_axis, int k_group, int v_group,
                        int page_tokens, int head_dim, bool token_norm);
KvFormat parse(std::string_view name);
std::string axis_name(const KvFormat& format);
std::string repr(const KvFormat& format);
nb::tuple reduce(const KvFormat& format);  // pickle's (callable, arguments)

}  // namespace bitdecoding::python
