// SPDX-License-Identifier: Apache-2.0
// From a struct of the kernel table to its compiled append kernel.
#pragma once

#include "bitdecoding/quantize/append_launch.cuh"
#include "cuda/append_row.hpp"

namespace bitdecoding {

using layout::PageConfig;

template <class Row>
constexpr AppendRow make_row() {
  return {Row::config, Row::name, &quantize::launch_append<Row>};
}

}  // namespace bitdecoding
