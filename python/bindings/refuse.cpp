// SPDX-License-Identifier: Apache-2.0
#include "refuse.hpp"

#include <stdexcept>

namespace bitdecoding::python {

void throw_if_error(const Status& status) {
  switch (status.code()) {
    case StatusCode::ok: return;
    case StatusCode::invalid_argument: throw nb::value_error(status.text().c_str());
    case StatusCode::unsupported:
      PyErr_SetString(PyExc_NotImplementedError, status.text().c_str());
      throw nb::python_error();
    case StatusCode::cuda_error: break;
  }
  throw std::runtime_error(status.text());
}

}  // namespace bitdecoding::python
