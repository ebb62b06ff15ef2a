// SPDX-License-Identifier: Apache-2.0
// Imports arrays through DLPack and checks what a host can see of them.
#include "arrays.hpp"

#include <climits>
#include <iterator>
#include <stdexcept>

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

std::string shape_text(const nb::ndarray<nb::ro>& array) {
  return tuple_text(static_cast<int>(array.ndim()), [&](int i) { return array.shape(i); });
}

// The start of DLPack's table of C functions, which newer libraries offer beside __dlpack__: a tenth
// of its time, and no question asked about the current device. Names of ours, layout of DLPack 1.
struct ExchangeTable {
  std::uint32_t major_version;
  std::uint32_t minor_version;
  const void* older_table;
  void* allocator;
  int (*to_managed)(void* object, void** managed);  // 0: an owned DLManagedTensorVersioned
};

struct ManagedTensor {  // the start of DLManagedTensorVersioned
  std::uint32_t major_version;
  std::uint32_t minor_version;
  void* context;
  void (*deleter)(ManagedTensor* self);
};

constexpr char kManagedName[] = "dltensor_versioned";

void delete_managed(PyObject* capsule) {  // only where nobody took it
  if (PyCapsule_IsValid(capsule, kManagedName) == 0) return;
  auto* managed = static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule, kManagedName));
  if (managed->deleter != nullptr) managed->deleter(managed);
}

// What __dlpack__ returns, by way of the table; `object` itself where its type has none.
nb::object exported(nb::handle object) {
  const nb::object holder = nb::getattr(object.type(), "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(holder.ptr(), "dlpack_exchange_api")) return nb::borrow(object);
  const auto* table =
      static_cast<const ExchangeTable*>(PyCapsule_GetPointer(holder.ptr(), "dlpack_exchange_api"));
  void* managed = nullptr;
  if (table->major_version != 1) return nb::borrow(object);
  if (table->to_managed(object.ptr(), &managed) != 0) {
    PyErr_Clear();
    return nb::borrow(object);
  }
  PyObject* capsule = PyCapsule_New(managed, kManagedName, delete_managed);
  if (capsule == nullptr) throw nb::python_error();
  return nb::steal(capsule);
}

nb::ndarray<nb::ro> import_array(nb::handle given, const char* name, Access access) {
  const nb::object object = exported(given);
  nb::ndarray<nb::ro> readable;
  nb::ndarray<> writable;
  if (access == Access::write && nb::try_cast(object, writable, false)) {
    return nb::ndarray<nb::ro>(writable);
  }
  if (!nb::try_cast(object, readable, false)) {
    refuse_type(name, " = ", nb::type_name(given.type()).c_str(),
                "; allowed: a NumPy array, a torch tensor or another DLPack array, of a dtype and "
                "strides that DLPack has");
  }
  if (access == Access::write) {
    refuse_value(name, " = a read-only array; allowed: one that can be written");
  }
  return readable;
}

Device import_device(const nb::ndarray<nb::ro>& array, const char* name) {
  switch (array.device_type()) {
    case nb::device::cpu::value:
    case nb::device::cuda_host::value: return {};
    case nb::device::cuda::value:
    case nb::device::cuda_managed::value: return {true, array.device_id()};
    default:
      refuse_value(name, ": device = DLPack type ", array.device_type(), "; allowed: cpu, cuda");
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

std::string device_name(const Device& device) {
  return device.is_cuda ? join("cuda:", device.index) : "cpu";
}

Array::Array(nb::handle object, const char* name, Access access)
    : name_(name),
      array_(import_array(object, name, access)),
      device_(import_device(array_, name)) {
  if (array_.itemsize() > 0) expect_address(array_.itemsize());
}

int Array::extent(int mode) const {
  if (array_.shape(mode) > INT_MAX) {
    refuse_value(name_, ": shape = ", shape_text(array_), "; allowed: extents up to ", INT_MAX);
  }
  return static_cast<int>(array_.shape(mode));
}

const Array& Array::expect_shape(const char* modes,
                                 std::initializer_list<std::int64_t> extents) const {
  const int count = static_cast<int>(extents.size());
  const std::int64_t* allowed = extents.begin();
  bool fits = static_cast<int>(array_.ndim()) == count;
  for (int mode = 0; fits && mode < count; ++mode) {
    fits = allowed[mode] == kAny || allowed[mode] == static_cast<std::int64_t>(array_.shape(mode));
  }
  if (!fits) {
    const auto extent_text = [&](int i) {
      return allowed[i] == kAny ? std::string("any") : join(allowed[i]);
    };
    refuse_value(name_, ": shape = ", shape_text(array_), "; allowed: ", modes, " = ",
                 tuple_text(count, extent_text));
  }
  return *this;
}

const Array& Array::expect_contiguous() const {
  std::int64_t contiguous = 1;
  for (int mode = static_cast<int>(array_.ndim()) - 1; !empty() && mode >= 0; --mode) {
    if (array_.shape(mode) > 1 && array_.stride(mode) != contiguous) {
      refuse_value(name_, ": strides = ",
                   tuple_text(static_cast<int>(array_.ndim()), [&](int i) { return stride(i); }),
                   " elements for shape ", shape_text(array_),
                   "; allowed: contiguous in row-major order");
    }
    contiguous *= static_cast<std::int64_t>(array_.shape(mode));
  }
  return *this;
}

const Array& Array::expect_unit_stride() const {
  const int last = static_cast<int>(array_.ndim()) - 1;
  if (!empty() && array_.shape(last) > 1 && array_.stride(last) != 1) {
    refuse_value(name_, ": stride of the last mode = ", array_.stride(last),
                 " elements; allowed: 1");
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
  if (reinterpret_cast<std::uintptr_t>(array_.data()) % alignment_bytes != 0) {
    refuse_value(name_, ": address = ", array_.data(), "; allowed: multiples of ", alignment_bytes);
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
