// SPDX-License-Identifier: Apache-2.0
// Checks what a host can see of arrays.
#include "arrays.hpp"

#include <climits>
#include <iterator>

namespace bitdecoding::python {

namespace {

using Dtype = nb::dlpack::dtype;

constexpr Dtype kFloat16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
constexpr Dtype kBfloat16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};

std::string dtype_name(Dtype dtype) {
  constexpr const char* kKinds[] = {"int", "uint", "float", nullptr, "bfloat", "complex"};
  if (dtype == nb::dtype<bool>()) return "bool";
  const char* kind = dtype.code < std::size(kKinds) ? kKinds[dtype.code] : nullptr;
  if (kind == nullptr || dtype.lanes != 1) {
    return join("DLPack code ", int{dtype.code}, ", ", int{dtype.bits}, " bits");
  }
  return join(kind, int{dtype.bits});
}

template <class Value>  // (mode) -> something printable
std::string tuple_text(int modes, const Value& value) {
  std::ostringstream text;
  text << '(';
  for (int mode = 0; mode < modes; ++mode) text << (mode > 0 ? ", " : "") << value(mode);
  text << (modes == 1 ? ",)" : ")");
  return text.str();
}

Device device_of(nb::dlpack::device device, const char* name) {
  switch (device.device_type) {
    case nb::device::cpu::value:
    case nb::device::cuda_host::value: return {};
    case nb::device::cuda::value:
    case nb::device::cuda_managed::value: return {true, device.device_id};
    default:
      refuse_value(name, ": device = DLPack type ", device.device_type, "; allowed: cpu, cuda");
  }
}

TokenRows token_rows(const Array& array) {
  return {.data = array.data(),
          .type = array.element_type(),
          .batch_stride = array.stride(0),
          .token_stride = array.stride(1),
          .head_stride = array.stride(2)};
}

}  // namespace

std::string device_name(const Device& device) {
  return device.is_cuda ? join("cuda:", device.index) : "cpu";
}

Array::Array(nb::handle object, const char* name, Access access, Lifetime lifetime)
    : name_(name),
      view_(view_array(object, name, access, lifetime)),
      device_(device_of(view_.tensor.device, name)) {
  if (dtype().bits >= 8) expect_address(dtype().bits / 8u);
}

bool Array::empty() const {
  for (int mode = 0; mode < modes(); ++mode) {
    if (shape(mode) == 0) return true;
  }
  return false;
}

std::string Array::shape_text() const {
  return tuple_text(modes(), [this](int mode) { return shape(mode); });
}

int Array::extent(int mode) const {
  if (shape(mode) > INT_MAX) {
    refuse_value(name_, ": shape = ", shape_text(), "; allowed: extents up to ", INT_MAX);
  }
  return static_cast<int>(shape(mode));
}

const Array& Array::expect_shape(const char* names,
                                 std::initializer_list<std::int64_t> extents) const {
  const int count = static_cast<int>(extents.size());
  const std::int64_t* allowed = extents.begin();
  bool fits = modes() == count;
  for (int mode = 0; fits && mode < count; ++mode) {
    fits = allowed[mode] == kAny || allowed[mode] == shape(mode);
  }
  if (!fits) {
    const auto extent_text = [&](int i) {
      return allowed[i] == kAny ? std::string("any") : join(allowed[i]);
    };
    refuse_value(name_, ": shape = ", shape_text(), "; allowed: ", names, " = ",
                 tuple_text(count, extent_text));
  }
  return *this;
}

const Array& Array::expect_elements(std::int64_t least) const {
  if (modes() != 1 || shape(0) < least) {
    refuse_value(name_, ": shape = ", shape_text(), "; allowed: (n,), n at least ", least);
  }
  return *this;
}

const Array& Array::expect_contiguous() const {
  std::int64_t contiguous = 1;
  for (int mode = modes() - 1; !empty() && mode >= 0; --mode) {
    if (shape(mode) > 1 && stride(mode) != contiguous) {
      refuse_value(name_, ": strides = ", tuple_text(modes(), [&](int i) { return stride(i); }),
                   " elements for shape ", shape_text(),
                   "; allowed: contiguous in row-major order");
    }
    contiguous *= shape(mode);
  }
  return *this;
}

const Array& Array::expect_unit_stride() const {
  const int last = modes() - 1;
  if (!empty() && shape(last) > 1 && stride(last) != 1) {
    refuse_value(name_, ": stride of the last mode = ", stride(last), " elements; allowed: 1");
  }
  return *this;
}

const Array& Array::expect_on(const Array& other) const {
  if (!(device_ == other.device_)) {
    refuse_value(name_, ": device = ", device_name(device_),
                 "; allowed: ", device_name(other.device_), ", where ", other.name_, " is");
  }
  return *this;
}

const Array& Array::expect_float16() const { return expect_dtype(kFloat16); }

ElementType Array::element_type() const {
  if (dtype() == kFloat16) return ElementType::f16;
  if (dtype() == kBfloat16) return ElementType::bf16;
  if (dtype() == nb::dtype<float>()) return ElementType::f32;
  refuse_type(name_, ": dtype = ", dtype_name(dtype()), "; allowed: float16, bfloat16, float32");
}

const Array& Array::expect_dtype(nb::dlpack::dtype allowed) const {
  if (dtype() != allowed) {
    refuse_type(name_, ": dtype = ", dtype_name(dtype()), "; allowed: ", dtype_name(allowed));
  }
  return *this;
}

const Array& Array::expect_address(std::uintptr_t alignment_bytes) const {
  if (reinterpret_cast<std::uintptr_t>(data()) % alignment_bytes != 0) {
    refuse_value(name_, ": address = ", data(), "; allowed: multiples of ", alignment_bytes);
  }
  return *this;
}

std::optional<Array> optional_ints(nb::handle object, const char* name, int batch,
                                   const Array& other) {
  if (object.is_none()) return std::nullopt;
  Array ints(object, name, Access::read);
  ints.expect_int32().expect_shape("(batch,)", {batch}).expect_contiguous().expect_on(other);
  return ints;
}

const std::int32_t* data_or_null(const std::optional<Array>& ints) {
  return ints ? static_cast<const std::int32_t*>(ints->data()) : nullptr;
}

std::optional<Array> optional_mean(nb::handle object, const Array& pool, int head_dim,
                                   Lifetime lifetime) {
  if (object.is_none()) return std::nullopt;
  Array mean(object, "k_mean", Access::read, lifetime);
  mean.expect_float16().expect_shape("(num_kv_heads, head_dim)", {pool.extent(1), head_dim});
  mean.expect_contiguous().expect_on(pool);
  return mean;
}

const std::uint16_t* mean_or_null(const std::optional<Array>& mean) {
  return mean ? static_cast<const std::uint16_t*>(mean->data()) : nullptr;
}

TokenArrays::TokenArrays(nb::handle k, nb::handle v, nb::handle leftpad, nb::handle num_tokens,
                         const Array& pool, int head_dim)
    : k_(k, "k", Access::read), v_(v, "v", Access::read) {
  constexpr char kModes[] = "(batch, tokens, num_kv_heads, head_dim)";
  const int num_kv_heads = pool.extent(1);
  k_.expect_shape(kModes, {kAny, kAny, num_kv_heads, head_dim}).expect_unit_stride();
  k_.expect_on(pool);
  v_.expect_shape(kModes, {k_.extent(0), k_.extent(1), num_kv_heads, head_dim});
  v_.expect_unit_stride().expect_on(k_);
  leftpad_ = optional_ints(leftpad, "leftpad", k_.extent(0), k_);
  num_tokens_ = optional_ints(num_tokens, "num_tokens", k_.extent(0), k_);
}

TokenRows TokenArrays::k() const { return token_rows(k_); }
TokenRows TokenArrays::v() const { return token_rows(v_); }

TokenRuns TokenArrays::runs() const {
  return {.batch = k_.extent(0),
          .row_tokens = k_.extent(1),
          .leftpad = data_or_null(leftpad_),
          .num_tokens = data_or_null(num_tokens_)};
}

}  // namespace bitdecoding::python
