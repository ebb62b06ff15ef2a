// SPDX-License-Identifier: Apache-2.0
// The result of a call: a code and, when it is an error, a text that names the argument, its value
// and the allowed values. Nothing below the Python bindings throws or prints.
#pragma once

#include <sstream>
#include <string>
#include <utility>

namespace bitdecoding {

enum class StatusCode {
  ok,
  invalid_argument,  // an argument that no build of the library accepts
  unsupported,       // legal, but this build or device has no kernel for it
  cuda_error,        // the driver or a launch reported an error
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string text) : code_(code), text_(std::move(text)) {}

  bool is_ok() const { return code_ == StatusCode::ok; }
  StatusCode code() const { return code_; }
  const std::string& text() const { return text_; }

 private:
  StatusCode code_ = StatusCode::ok;
  std::string text_;
};

// Joins its arguments to the text of an `invalid_argument`:
//   invalid_argument("head_dim = ", 96, "; allowed: 64, 128, 256")
template <class... Parts>
Status invalid_argument(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return Status(StatusCode::invalid_argument, text.str());
}

}  // namespace bitdecoding
