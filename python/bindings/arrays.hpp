// SPDX-License-Identifier: Apache-2.0
// From Python's arrays to the library's views. Nothing is ever copied: an array that doesn't fit is
// refused with its name, what it is and what it may be.
//   TypeError: not an array, or its dtype    ValueError: everything else
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "bitdecoding/element_type.hpp"
#include "bitdecoding/quantize/token_rows.hpp"
#include "dlpack.hpp"
#include "refuse.hpp"

namespace bitdecoding::python {

struct Device {
  bool is_cuda = false;
  int index = 0;

  friend bool operator==(const Device&, const Device&) = default;
};
std::string device_name(const Device& device);  // "cpu", "cuda:0"

inline constexpr std::int64_t kAny = -1;  // an extent that may be anything

// One array: an argument of a call, or (Lifetime::longer) one that is held for as long as this
// lives.
class Array {
 public:
  Array(nb::handle object, const char* name, Access access, Lifetime lifetime = Lifetime::call);

  Device device() const { return device_; }
  bool empty() const;
  int extent(int mode) const;  // refuses what doesn't fit an int
  std::int64_t stride(int mode) const { return view_.tensor.strides[mode]; }  // elements
  const void* data() const { return view_.tensor.data; }
  template <class Element>
  Element* writable() const {  // only for Access::write
    return static_cast<Element*>(view_.tensor.data);
  }

  // `names`: of the extents, for messages: "(num_pages, num_kv_heads, page_bytes)".
  const Array& expect_shape(const char* names, std::initializer_list<std::int64_t> extents) const;
  const Array& expect_elements(std::int64_t least) const;  // of the only mode
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
  int modes() const { return view_.tensor.ndim; }
  std::int64_t shape(int mode) const { return view_.tensor.shape[mode]; }
  std::string shape_text() const;
  nb::dlpack::dtype dtype() const { return view_.tensor.dtype; }
  const Array& expect_dtype(nb::dlpack::dtype allowed) const;

  const char* name_;
  ArrayView view_;
  Device device_;
};

// An optional int32 [batch] argument beside `other`; None is nullptr.
std::optional<Array> optional_ints(nb::handle object, const char* name, int batch,
                                   const Array& other);
const std::int32_t* data_or_null(const std::optional<Array>& ints);

// An optional mean of K, float16 [num_kv_heads, head_dim], beside `pool`; None is nullptr.
std::optional<Array> optional_mean(nb::handle object, const Array& pool, int head_dim,
                                   Lifetime lifetime = Lifetime::call);
const std::uint16_t* mean_or_null(const std::optional<Array>& mean);

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
