# SPDX-License-Identifier: Apache-2.0
# Install tree and CMake package; the same below a prefix and below bitdecoding/ in a wheel.
include(CMakePackageConfigHelpers)
set(package "${CMAKE_INSTALL_LIBDIR}/cmake/bitdecoding")
set(BITDECODING_CUDART_DIR "${CMAKE_INSTALL_LIBDIR}/bitdecoding")

install(TARGETS bitdecoding EXPORT bitdecodingTargets ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(TARGETS bitdecoding_headers EXPORT bitdecodingHeadersTargets)
foreach(export bitdecodingTargets bitdecodingHeadersTargets)
  install(EXPORT ${export} NAMESPACE bitdecoding:: DESTINATION "${package}")
endforeach()
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
if(BITDECODING_NVCC)  # so that users of the static library need no CUDA toolkit
  install(FILES "${BITDECODING_CUDART}" DESTINATION "${BITDECODING_CUDART_DIR}")
endif()

configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/bitdecodingConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/bitdecodingConfig.cmake" INSTALL_DESTINATION "${package}" PATH_VARS BITDECODING_CUDART_DIR)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/bitdecodingConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES
  "${PROJECT_BINARY_DIR}/bitdecodingConfig.cmake" "${PROJECT_BINARY_DIR}/bitdecodingConfigVersion.cmake"
  "${CMAKE_CURRENT_LIST_DIR}/bitdecodingToolchain.cmake" "${PROJECT_SOURCE_DIR}/third_party/toolchain.txt"
  DESTINATION "${package}")
if(NOT SKBUILD)  # a wheel has them in its metadata
  install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" "${PROJECT_SOURCE_DIR}/THIRD_PARTY.md"
          DESTINATION "${CMAKE_INSTALL_DOCDIR}")
endif()
