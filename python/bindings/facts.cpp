// SPDX-License-Identifier: Apache-2.0
// The facts of the build: "" becomes None, lists become lists.
#include "facts.hpp"

#include <sstream>
#include <string>

#include "arrays.hpp"
#include "bitdecoding/build_info.hpp"
#include "bitdecoding/run.hpp"

namespace bitdecoding::python {

namespace nb = nanobind;

namespace {

nb::object text_or_none(const std::string& text) {
  return text.empty() ? nb::none() : nb::object(nb::str(text.c_str()));
}

}  // namespace

nb::dict build_facts() {
  const BuildInfo info = build_info();
  nb::list architectures;
  std::istringstream names(info.architectures);  // CMake's list: "80-real;90a-real"
  for (std::string name; std::getline(names, name, ';');) {
    architectures.append(nb::str(name.c_str()));
  }
  nb::list kernels;
  for (const std::string& kernel : info.kernels) kernels.append(nb::str(kernel.c_str()));

  nb::dict facts;
  facts["version"] = nb::str(info.version.c_str());
  facts["format_version"] = info.format_version;
  facts["git"] = nb::str(info.git.c_str());
  facts["compiler"] = nb::str(info.compiler.c_str());
  facts["cuda"] = text_or_none(info.cuda);
  facts["architectures"] = architectures;
  facts["kernels"] = kernels;
  facts["cuda_driver"] = text_or_none(cuda_driver_version());
  return facts;
}

std::string decode_kernel(const KvFormat& format, int columns, int compute_capability) {
  const char* kernel = "";
  throw_if_error(choose_decode_kernel(format, columns, compute_capability, &kernel));
  return kernel;
}

}  // namespace bitdecoding::python
