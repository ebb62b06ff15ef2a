# SPDX-License-Identifier: Apache-2.0
# Fails, naming file and line, if a header of torch, Python or nanobind is included outside python/.
file(GLOB_RECURSE sources include/* src/* tests/*.cpp tests/*.cu tests/*.hpp benchmarks/*.cpp benchmarks/*.hpp)
set(found "")
foreach(source IN LISTS sources)
  file(STRINGS "${source}" lines REGEX "#[ \t]*include[ \t]*[<\"](torch/|ATen/|c10/|Python\\.h|pybind11/|nanobind/)")
  foreach(line IN LISTS lines)
    string(APPEND found "${source}: ${line}\n")
  endforeach()
endforeach()
if(found)
  message(FATAL_ERROR "framework headers belong in python/:\n${found}")
endif()
