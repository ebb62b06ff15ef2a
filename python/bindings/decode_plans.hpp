// SPDX-License-Identifier: Apache-2.0
// Plans of decode, made once per process: they depend on what they are asked for and on no array.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>

#include "bitdecoding/decode/decode_plan.hpp"
#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::python {

namespace nb = nanobind;

// Query columns, and the kernel of build_info() that was asked for, on a CUDA device. The
// interpreter lock is held; the reference stays good.
const decode::DecodePlan& decode_plan(const KvFormat& format, int columns,
                                      const std::optional<std::string>& kernel, int device);

nb::dict plan_facts(const decode::DecodePlan& plan);

}  // namespace bitdecoding::python
