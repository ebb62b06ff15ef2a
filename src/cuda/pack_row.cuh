// SPDX-License-Identifier: Apache-2.0
// From a struct of the kernel table to its compiled pack kernel.
#pragma once

#include "bitdecoding/quantize/pack_launch.cuh"
#include "cuda/pack_row.hpp"

namespace bitdecoding {

using layout::PageConfig;

template <class Row>
constexpr PackRow make_row() {
  return {Row::config, Row::name, &quantize::launch_pack<Row>};
}

}  // namespace bitdecoding
