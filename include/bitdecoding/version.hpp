// SPDX-License-Identifier: Apache-2.0
// The version of bitdecoding. CMakeLists.txt and pyproject.toml read it from here.
#pragma once

namespace bitdecoding {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace bitdecoding
