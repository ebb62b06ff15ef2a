// SPDX-License-Identifier: Apache-2.0
// Python's exceptions: texts from their parts, and what an error Status becomes.
#pragma once

#include <nanobind/nanobind.h>

#include <sstream>
#include <string>

#include "bitdecoding/status.hpp"

namespace bitdecoding::python {

namespace nb = nanobind;

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] void refuse_value(const Parts&... parts) {
  throw nb::value_error(join(parts...).c_str());
}
template <class... Parts>
[[noreturn]] void refuse_type(const Parts&... parts) {
  throw nb::type_error(join(parts...).c_str());
}

// ValueError, NotImplementedError or RuntimeError where `status` is an error.
void throw_if_error(const Status& status);

}  // namespace bitdecoding::python
