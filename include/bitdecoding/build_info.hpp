// SPDX-License-Identifier: Apache-2.0
// What this build of the library is: where it comes from, what compiled it, which kernels it holds.
#pragma once

#include <string>
#include <vector>

namespace bitdecoding {

struct BuildInfo {
  std::string version;               // kVersion
  int format_version;                // kFormatVersion: of the bytes of pages
  std::string git;                   // git describe of the source tree, or "unknown"
  std::string compiler;              // e.g. "GNU 12.2.0"
  std::string cuda;                  // version of the CUDA compiler, "" where there are no kernels
  std::string architectures;         // e.g. "80-real;90a-real", "" where there are no kernels
  std::vector<std::string> kernels;  // their names in the kernel table
};

BuildInfo build_info();

// The newest CUDA version that the installed driver serves, e.g. "13.0"; "" without a driver
// or this build has no kernels. Creates no CUDA context.
std::string cuda_driver_version();

}  // namespace bitdecoding
