// SPDX-License-Identifier: Apache-2.0
// From a struct of the kernel table to its compiled decode kernel.
#pragma once

#include "bitdecoding/decode/launch.cuh"
#include "cuda/decode_row.hpp"

namespace bitdecoding {

using decode::Arch;
using decode::DecodeConfig;
using layout::PageConfig;

template <class Row>
constexpr DecodeRow make_row() {
  return {Row::config, Row::name, &decode::plan_decode<Row>, &decode::launch_decode<Row>};
}

}  // namespace bitdecoding
