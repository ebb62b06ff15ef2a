// SPDX-License-Identifier: Apache-2.0
// From Python's arrays to the library's views. Only arrays.{hpp,cpp} know DLPack. Nothing is ever
// copied: an array that doesn't fit is refused with its name, what it is and what it may be.
//   TypeError: not an array, or its dtype    ValueError: everything else
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#include "bitdecoding/element_type.hpp"
#include "bitdecoding/quantize/token_rows.hpp"
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

struct Device {
  bool is_cuda = false;
  int index = 0;

  friend bool operator==(const Device&, const Device&) = default;
};
std::string device_name(const Device& device);  // "cpu", "cuda:0"

enum class Access { read, write };

inline constexpr std::int64_t kAny = -1;  // an extent that may be anything

// One array argument of a call. Holds the memory for as long as it lives.
class Array {
 public:
  Array(nb::handle object, const char* name, Access access);

  Device device() const { return device_; }
  bool empty() const { return array_.size() == 0; }
  int extent(int mode) const;  // refuses what doesn't fit an int
  std::int64_t stride(int mode) const { return array_.stride(mode); }  // elements
  const void* data() const { return array_.data(); }
  template <class Element>
  Element* writable() const {  // only for Access::write
    return static_cast<Element*>(const_cast<void*>(array_.data()));
  }

  // `modes` names the extents in messages: "(num_pages, num_kv_heads, page_bytes)".
  const Array& expect_shape(const char* modes, std::initializer_list<std::int64_t> extents) const;
  const Array& expect_contiguous() const;
  const Array& expect_unit_stride() const;  // of the last mode
  const Array& expect_address(std::uintptr_t alignment_bytes) const;
  const Array& expect_on(const Array& other) const;
  const Array& expect_bytes() const { return expect_dtype(nb::dtype<std::uint8_t>()); }
  const Array& expect_int32() const { return expect_dtype(nb::dtype<std::int32_t>()); }
  const Array& expect_float32() const { return expect_dtype(nb::dtype<float>()); }
  const Array& expect_float16() const;
  const Array& expect_same_dtype(const Array& other) const { return expect_dtype(other.dtype()); }
  ElementType element_type() const;  // refuses what is not float16, bfloat16 or float32

 private:
  nb::dlpack::dtype dtype() const { return array_.dtype(); }
  const Array& expect_dtype(nb::dlpack::dtype allowed) const;

  const char* name_;
  nb::ndarray<nb::ro> array_;
  Device device_;
};

// An optional int32 [batch] argument beside `other`; None is nullptr.
std::optional<Array> optional_ints(nb::handle object, const char* name, int batch,
                                   const Array& other);
const std::int32_t* data_or_null(const std::optional<Array>& ints);

// k and v of one call (B, S, H, D), with the real tokens of each row.
class TokenArrays {
 public:
  // Beside `pool` (num_pages, num_kv_heads, page_bytes).
  TokenArrays(nb::handle k, nb::handle v, nb::handle leftpad, nb::handle num_tokens,
              const Array& pool, int head_dim);
  const Array& k_array() const { return k_; }
  TokenRows k() const;
  TokenRows v() const;
  TokenRuns runs() const;

 private:
  Array k_;
  Array v_;
  std::optional<Array> leftpad_;
  std::optional<Array> num_tokens_;
};

}  // namespace bitdecoding::python
