// SPDX-License-Identifier: Apache-2.0
// The legal formats that the kernel table is to serve: at head_dim 256 it has some pages, not all.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "bitdecoding/build_info.hpp"
#include "legal_formats.hpp"

namespace bitdecoding::test {

inline std::vector<KvFormat> built_formats() {
  const std::vector<std::string> kernels = build_info().kernels;
  std::vector<KvFormat> formats = all_formats();
  std::erase_if(formats, [&](const KvFormat& f) {
    const std::string row = "pack_k" + std::to_string(f.k_bits) + "v" + std::to_string(f.v_bits) +
                            "_" + "ctb"[static_cast<int>(f.k_axis)] + "_d" +
                            std::to_string(f.head_dim);
    return f.head_dim > 128 && std::find(kernels.begin(), kernels.end(), row) == kernels.end();
  });
  return formats;
}

}  // namespace bitdecoding::test
