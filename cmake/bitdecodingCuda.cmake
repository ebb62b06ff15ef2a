# SPDX-License-Identifier: Apache-2.0
# BITDECODING_CUDA decides which CUDA compiler builds the kernels:
#   auto    the system's nvcc if there is one, else pypi
#   system  the system's nvcc, 13.0 or newer
#   pypi    the pinned nvcc of third_party/toolchain.txt
#   off     none: CPU backend only
# A compiler that is found but too old, incomplete or broken is an error, never a CPU-only build.
set(BITDECODING_CUDA auto CACHE STRING "CUDA compiler: auto, system, pypi or off")
set_property(CACHE BITDECODING_CUDA PROPERTY STRINGS auto system pypi off)
set(BITDECODING_CUDA_MINIMUM 13.0)
set(BITDECODING_WAYS_OUT "Ways out: set CMAKE_CUDA_COMPILER to the nvcc of a complete CUDA toolkit \
${BITDECODING_CUDA_MINIMUM} or newer, or choose BITDECODING_CUDA=pypi (fetches a compiler) or off (no kernels).\n")

function(bitdecoding_find_system_nvcc out)
  if(CMAKE_CUDA_COMPILER)
    set(found "${CMAKE_CUDA_COMPILER}")
  elseif(DEFINED ENV{CUDACXX})
    set(found "$ENV{CUDACXX}")
  else()
    find_program(found nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
  endif()
  string(REPLACE "found-NOTFOUND" "" found "${found}")
  set(${out} "${found}" PARENT_SCOPE)
endfunction()

# Compiles and links a program that needs every part of a toolkit that our kernels need.
function(bitdecoding_probe_nvcc nvcc)
  if(BITDECODING_PROBED_NVCC STREQUAL nvcc AND EXISTS "${nvcc}")
    return()
  endif()
  execute_process(COMMAND "${nvcc}" --version RESULT_VARIABLE result OUTPUT_VARIABLE text ERROR_VARIABLE text)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" found "${text}")
  if(NOT result EQUAL 0 OR NOT found)
    message(FATAL_ERROR "bitdecoding: '${nvcc} --version' failed (${result}): ${text}\n${BITDECODING_WAYS_OUT}")
  elseif(CMAKE_MATCH_1 VERSION_LESS BITDECODING_CUDA_MINIMUM)
    message(FATAL_ERROR "bitdecoding: ${nvcc} is CUDA ${CMAKE_MATCH_1}; needed is ${BITDECODING_CUDA_MINIMUM} "
      "or newer.\n${BITDECODING_WAYS_OUT}")
  endif()
  set(dir "${CMAKE_BINARY_DIR}/nvcc_probe")
  file(WRITE "${dir}/probe.cu" "#include <cuda_runtime.h>\n#include <cuda_fp16.h>\n#include <cuda/std/utility>\n"
    "__global__ void probe(__half* x) { *x = __hadd(*x, *x); }\n"
    "int main() { probe<<<1, 1>>>(nullptr); return cudaGetLastError() != cudaSuccess; }\n")
  execute_process(
    COMMAND "${nvcc}" -ccbin "${CMAKE_CXX_COMPILER}" -std=c++20 -arch=sm_80 -cudart=static probe.cu -o probe
    WORKING_DIRECTORY "${dir}" RESULT_VARIABLE result OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "bitdecoding: ${nvcc} (CUDA ${CMAKE_MATCH_1}) with ${CMAKE_CXX_COMPILER} cannot build a "
      "program of one kernel; the toolkit is incomplete or does not fit this compiler:\n${text}\n"
      "${BITDECODING_WAYS_OUT}")
  endif()
  set(BITDECODING_PROBED_NVCC "${nvcc}" CACHE INTERNAL "the CUDA compiler that has built the probe")
endfunction()

# Sets CMAKE_CUDA_COMPILER, or leaves it empty for off. A macro: enable_language reads these variables.
macro(bitdecoding_choose_nvcc)
  if(NOT BITDECODING_CUDA MATCHES "^(auto|system|pypi|off)$")
    message(FATAL_ERROR "bitdecoding: BITDECODING_CUDA = '${BITDECODING_CUDA}'; allowed: auto, system, pypi, off")
  endif()
  # CMake keeps a tree's first compiler whatever is asked later.
  if(DEFINED BITDECODING_CONFIGURED_CUDA AND NOT BITDECODING_CUDA STREQUAL BITDECODING_CONFIGURED_CUDA)
    message(FATAL_ERROR "bitdecoding: BITDECODING_CUDA = '${BITDECODING_CUDA}', but ${CMAKE_BINARY_DIR} was configured "
      "with '${BITDECODING_CONFIGURED_CUDA}'; allowed: the same, another build directory, or cmake --fresh")
  endif()
  set(BITDECODING_NVCC "")
  if(BITDECODING_CUDA MATCHES "^(auto|system)$")
    bitdecoding_find_system_nvcc(BITDECODING_NVCC)
  endif()
  if(BITDECODING_CUDA STREQUAL system AND NOT BITDECODING_NVCC)
    message(FATAL_ERROR "bitdecoding: BITDECODING_CUDA=system, but there is no nvcc in CMAKE_CUDA_COMPILER, CUDACXX, "
      "PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda.\n${BITDECODING_WAYS_OUT}")
  endif()
  if(BITDECODING_CUDA STREQUAL pypi OR (BITDECODING_CUDA STREQUAL auto AND NOT BITDECODING_NVCC))
    bitdecoding_toolchain(BITDECODING_NVCC cuda "cuda-.*|nvvm")
    string(APPEND BITDECODING_NVCC /nvidia/cu13/bin/nvcc)
  endif()
  if(BITDECODING_NVCC)
    bitdecoding_probe_nvcc("${BITDECODING_NVCC}")
    set(CMAKE_CUDA_COMPILER "${BITDECODING_NVCC}" CACHE FILEPATH "nvcc")
    set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}" CACHE FILEPATH "host compiler of nvcc")
    set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real" CACHE STRING "machine code only: drivers reject newer PTX")
  endif()
  set(BITDECODING_CONFIGURED_CUDA "${BITDECODING_CUDA}" CACHE INTERNAL "what chose this tree's CUDA compiler")
endmacro()

# bitdecoding::cudart, the static runtime of this compiler (find_package(CUDAToolkit) would want the shared one).
macro(bitdecoding_find_cudart)
  find_library(BITDECODING_CUDART cudart_static REQUIRED NO_CACHE HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  add_library(bitdecoding::cudart STATIC IMPORTED GLOBAL)
  set_target_properties(bitdecoding::cudart PROPERTIES
    IMPORTED_LOCATION "${BITDECODING_CUDART}" INTERFACE_LINK_LIBRARIES "Threads::Threads;dl;rt"
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}")
endmacro()
