# SPDX-License-Identifier: Apache-2.0
# Finds CUTLASS (CuTe) and the CUDA headers it includes, and offers them as the target bitdecoding::cute.
# The build and find_package(bitdecoding) share this file. They look, in this order, at
#   CUTLASS       CUTLASS_INCLUDE_DIR, the Python package nvidia-cutlass, the toolchain directory
#   CUDA headers  BITDECODING_CUDA_INCLUDE_DIR, the CUDA compiler in use, the toolchain directory, the Python
#                packages nvidia-cuda-{runtime,crt,cccl}, an installed toolkit
# The toolchain directory holds pinned PyPI packages (toolchain.txt); only the build installs them there.
set(BITDECODING_TOOLCHAIN_PINS "${CMAKE_CURRENT_LIST_DIR}/toolchain.txt")
if(NOT EXISTS "${BITDECODING_TOOLCHAIN_PINS}")
  set(BITDECODING_TOOLCHAIN_PINS "${CMAKE_CURRENT_LIST_DIR}/../third_party/toolchain.txt")
endif()
set(BITDECODING_TOOLCHAIN_DIR "$ENV{BITDECODING_TOOLCHAIN_DIR}" CACHE PATH
    "Directory of the CUDA compiler, CUDA headers and CUTLASS taken from PyPI")
set(BITDECODING_CUTLASS_MINIMUM 4.2.0)

# `out` = the directory with all pinned packages whose names match `pattern`, or "" if one is missing;
# `out`_LINE = the command that installs them.
function(bitdecoding_toolchain out name pattern)
  set(dir "${BITDECODING_TOOLCHAIN_DIR}/${name}")
  file(STRINGS "${BITDECODING_TOOLCHAIN_PINS}" pins REGEX "^nvidia-(${pattern})==")
  list(JOIN pins " " packages)
  set(line "python3 -m pip install --no-deps --target ${dir} ${packages}")
  set(missing "")
  foreach(pin IN LISTS pins)
    string(REGEX MATCH "^(.*)==(.*)$" pin "${pin}")
    string(REPLACE "-" "_" package "${CMAKE_MATCH_1}")
    if(NOT EXISTS "${dir}/${package}-${CMAKE_MATCH_2}.dist-info")
      list(APPEND missing "${pin}")
    endif()
  endforeach()
  if(missing AND BITDECODING_TOOLCHAIN_INSTALL)
    message(STATUS "bitdecoding: ${line}")
    file(REMOVE_RECURSE "${dir}")  # pip adds nothing to a package directory that is already there
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m pip --disable-pip-version-check install --quiet --no-deps
              --target "${dir}" ${pins}
      RESULT_VARIABLE result OUTPUT_VARIABLE log ERROR_VARIABLE log)
    if(NOT result EQUAL 0)
      message(FATAL_ERROR "${log}\nbitdecoding: ${Python_EXECUTABLE} could not install ${packages}. "
        "Run this line with a Python that has pip, then configure again:\n  ${line}\n")
    endif()
    set(missing "")
  endif()
  if(missing)
    set(dir "")
  endif()
  set(${out} "${dir}" PARENT_SCOPE)
  set(${out}_LINE "${line}" PARENT_SCOPE)
endfunction()

# `out` = directory of an importable Python package, "" if there is none. Nothing is imported.
function(bitdecoding_python_package out name)
  if(NOT Python_EXECUTABLE)
    find_package(Python QUIET COMPONENTS Interpreter)
  endif()
  set(ask "import sys, importlib.util as u
try: print(u.find_spec('${name}').submodule_search_locations[0], end='')
except (ImportError, AttributeError): pass")
  set(dir "")
  if(Python_EXECUTABLE)
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "${ask}" OUTPUT_VARIABLE dir ERROR_QUIET)
  endif()
  set(${out} "${dir}" PARENT_SCOPE)
endfunction()

# BITDECODING_CUTLASS = an include directory with cute/ and cutlass/; BITDECODING_CUTLASS_REASON = why there is none.
function(bitdecoding_find_cutlass)
  set(dir "${CUTLASS_INCLUDE_DIR}")
  set(reason "")
  if(NOT dir)
    bitdecoding_python_package(dir cutlass_library)
    if(NOT dir)
      bitdecoding_toolchain(dir cutlass "cutlass")
      string(REGEX REPLACE "(.)$" "\\1/cutlass_library" dir "${dir}")
    endif()
    string(REGEX REPLACE "(.)$" "\\1/source/include" dir "${dir}")
  endif()
  set(version "")
  if(EXISTS "${dir}/cutlass/version.h")
    file(STRINGS "${dir}/cutlass/version.h" version REGEX "^#define CUTLASS_(MAJOR|MINOR|PATCH) +[0-9]+")
    string(REGEX REPLACE "[^;0-9]+" "" version "${version}")
    string(REPLACE ";" "." version "${version}")
  endif()
  if(NOT dir)
    set(reason "CUTLASS not found. Set CUTLASS_INCLUDE_DIR, or set BITDECODING_TOOLCHAIN_DIR and run\n  ${dir_LINE}\n")
  elseif(NOT version OR version VERSION_LESS BITDECODING_CUTLASS_MINIMUM)
    set(reason "CUTLASS in '${dir}' has version '${version}'; needed is ${BITDECODING_CUTLASS_MINIMUM} or newer. \
Set CUTLASS_INCLUDE_DIR to its include directory.\n")
  endif()
  set(BITDECODING_CUTLASS "${dir}" PARENT_SCOPE)
  set(BITDECODING_CUTLASS_REASON "${reason}" PARENT_SCOPE)
endfunction()

# BITDECODING_CUDA_HEADERS = include directories of the CUDA runtime and CCCL; ..._REASON = why there are none.
function(bitdecoding_find_cuda_headers)
  set(candidates "${BITDECODING_CUDA_INCLUDE_DIR}" ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  set(line "")
  if(NOT candidates)
    bitdecoding_toolchain(dir cuda-headers "cuda-runtime|cuda-crt|cuda-cccl")
    set(line " and run\n  ${dir_LINE}\n")
    bitdecoding_python_package(package nvidia.cu13)
    set(candidates "${dir}/nvidia/cu13/include" "${package}/include")
    if(NOT dir)
      find_package(CUDAToolkit 13.0 QUIET)
      list(APPEND candidates ${CUDAToolkit_INCLUDE_DIRS})
    endif()
  endif()
  set(reason "CUDA headers (runtime, crt, cccl) not found in: ${candidates}. Set BITDECODING_CUDA_INCLUDE_DIR to the \
include directory of CUDA 13.0 or newer, or set BITDECODING_TOOLCHAIN_DIR${line}")
  foreach(dir IN LISTS candidates)
    if(EXISTS "${dir}/cuda_runtime_api.h" AND EXISTS "${dir}/crt/host_defines.h"
       AND EXISTS "${dir}/cccl/cuda/std/utility")
      set(BITDECODING_CUDA_HEADERS "${dir};${dir}/cccl" PARENT_SCOPE)
      set(reason "")
      break()
    endif()
  endforeach()
  set(BITDECODING_CUDA_HEADERS_REASON "${reason}" PARENT_SCOPE)
endfunction()

# Defines bitdecoding::cute, or sets BITDECODING_CUTE_REASON to what is missing.
macro(bitdecoding_find_cute)
  bitdecoding_find_cutlass()
  bitdecoding_find_cuda_headers()
  set(BITDECODING_CUTE_REASON "${BITDECODING_CUTLASS_REASON}${BITDECODING_CUDA_HEADERS_REASON}")
  if(NOT BITDECODING_CUTE_REASON AND NOT TARGET bitdecoding::cute)
    add_library(bitdecoding::cute INTERFACE IMPORTED GLOBAL)
    target_include_directories(bitdecoding::cute SYSTEM INTERFACE
      "${BITDECODING_CUTLASS}" ${BITDECODING_CUDA_HEADERS})
  endif()
endmacro()
