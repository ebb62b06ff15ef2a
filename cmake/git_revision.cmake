# SPDX-License-Identifier: Apache-2.0
# cmake -D SOURCE=... -D OUTPUT=... -P git_revision.cmake: writes the header only when the revision has changed.
set(revision "")
if(EXISTS "${SOURCE}/.git")
  execute_process(COMMAND git describe --always --dirty --abbrev=12 WORKING_DIRECTORY "${SOURCE}"
                  OUTPUT_VARIABLE revision OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT revision)
  set(revision unknown)
endif()
file(CONFIGURE OUTPUT "${OUTPUT}" CONTENT
"// Written by CMake.\n#pragma once\n
namespace bitdecoding {
inline constexpr char kGitRevision[] = \"${revision}\";
}  // namespace bitdecoding\n")
