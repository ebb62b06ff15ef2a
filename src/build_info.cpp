// SPDX-License-Identifier: Apache-2.0
// The facts of a build. CMake writes build_facts.hpp when it configures and git_revision.hpp at
// every build.
#include "bitdecoding/build_info.hpp"

#include "bitdecoding/format/kv_format.hpp"
#include "bitdecoding/version.hpp"
#include "build_facts.hpp"
#include "git_revision.hpp"

namespace bitdecoding {

BuildInfo build_info() {
  return BuildInfo{
      .version = kVersion,
      .format_version = kFormatVersion,
      .git = kGitRevision,
      .compiler = kCompiler,
      .cuda = kCudaCompiler,
      .architectures = kCudaArchitectures,
      .kernels = {std::begin(kKernels), std::end(kKernels) - 1},
  };
}

}  // namespace bitdecoding
