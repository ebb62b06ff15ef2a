// SPDX-License-Identifier: Apache-2.0
// Tokens of one head on their way into the cache: any input type becomes fp16, once, on arrival,
// and is transformed as the format says.
#pragma once

#include <cstdint>

#include "bitdecoding/format/rotation.hpp"
#include "bitdecoding/layout/page_config.hpp"
#include "bitdecoding/quantize/token_rows.hpp"

namespace bitdecoding::cpu {

using layout::kMaxHeadDim;
using layout::kMaxPageTokens;

// K or V of a page: fp16 bits (N,D), rows of head_dim.
struct alignas(64) TokenTile {
  std::uint16_t values[kMaxPageTokens * kMaxHeadDim];
};

// `count` channels of a token, a multiple of 8, from an input element on, as the cache holds them.
void arrive(const TokenRows& rows, std::int64_t element, int count, const format::Arrival& arrival,
            std::uint16_t* fp16);

}  // namespace bitdecoding::cpu
