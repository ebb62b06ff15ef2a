// SPDX-License-Identifier: Apache-2.0
// Prefill pack over arrays: on the CPU, or on a CUDA stream.
#pragma once

#include <nanobind/nanobind.h>

#include "bitdecoding/format/kv_format.hpp"
#include "execution.hpp"

namespace bitdecoding::python {

void pack_arrays(nanobind::handle k, nanobind::handle v, nanobind::handle pool,
                 nanobind::handle block_table, const KvFormat& format, int keep_first,
                 nanobind::handle first_page, nanobind::handle leftpad, nanobind::handle num_tokens,
                 nanobind::handle k_mean, const RunOptions& options, nanobind::handle error_word);

}  // namespace bitdecoding::python
