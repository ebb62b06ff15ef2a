// SPDX-License-Identifier: Apache-2.0
// Arrays by way of DLPack's table of C functions where their library has one, else of __dlpack__.
#include "dlpack.hpp"

#include "refuse.hpp"

namespace bitdecoding::python {

namespace {

using Tensor = nb::dlpack::dltensor;

// DLPack's table of C functions, which newer libraries offer beside __dlpack__: a tenth of its
// time, and no question asked about the current device. Names of ours, layout of DLPack 1.
// Functions return 0, or else raise.
struct ExchangeTable {
  std::uint32_t major_version;
  std::uint32_t minor_version;
  const void* older_table;
  void* allocator;
  int (*to_managed)(void* object, void** managed);  // an owned DLManagedTensorVersioned
  void* from_managed;
  int (*to_view)(void* object, Tensor* view);  // the object's own shape and strides; or nullptr
  int (*current_stream)(int device_type, std::int32_t device, void** stream);
};

struct ManagedTensor {  // the start of DLManagedTensorVersioned
  std::uint32_t major_version;
  std::uint32_t minor_version;
  void* context;
  void (*deleter)(ManagedTensor* self);
};

constexpr char kManagedName[] = "dltensor_versioned";
constexpr char kTableName[] = "dlpack_exchange_api";

void delete_managed(PyObject* capsule) {  // only where nobody took it
  if (PyCapsule_IsValid(capsule, kManagedName) == 0) return;
  auto* managed = static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule, kManagedName));
  if (managed->deleter != nullptr) managed->deleter(managed);
}

// The table of the object's type, nullptr where it has none. The last type that had one is kept:
// a program's arrays are nearly all of one type.
const ExchangeTable* table_of(nb::handle object) {
  static PyObject* known = nullptr;
  static const ExchangeTable* known_table = nullptr;
  const nb::handle type = object.type();
  if (type.ptr() == known) return known_table;
  const nb::object holder = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(holder.ptr(), kTableName)) return nullptr;
  const auto* table =
      static_cast<const ExchangeTable*>(PyCapsule_GetPointer(holder.ptr(), kTableName));
  if (table->major_version != 1) return nullptr;
  Py_XDECREF(known);
  known = type.inc_ref().ptr();
  return known_table = table;
}

bool view_by_table(const ExchangeTable& table, nb::handle object, Tensor* view) {
  if (table.to_view == nullptr) return false;
  if (table.to_view(object.ptr(), view) != 0) {
    PyErr_Clear();
    return false;
  }
  view->data = static_cast<char*>(view->data) + view->byte_offset;
  return view->ndim == 0 || view->strides != nullptr;
}

// What __dlpack__ returns, by way of the table; `object` itself where that has no way.
nb::object exported(const ExchangeTable* table, nb::handle object) {
  void* managed = nullptr;
  if (table == nullptr) return nb::borrow(object);
  if (table->to_managed(object.ptr(), &managed) != 0) {
    PyErr_Clear();
    return nb::borrow(object);
  }
  PyObject* capsule = PyCapsule_New(managed, kManagedName, delete_managed);
  if (capsule == nullptr) throw nb::python_error();
  return nb::steal(capsule);
}

nb::ndarray<nb::ro> import_array(const ExchangeTable* table, nb::handle given, const char* name,
                                 Access access) {
  const nb::object object = exported(table, given);
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

}  // namespace

ArrayView view_array(nb::handle object, const char* name, Access access, Lifetime lifetime) {
  ArrayView view;
  const ExchangeTable* table = table_of(object);
  if (table != nullptr && lifetime == Lifetime::call &&
      view_by_table(*table, object, &view.tensor)) {
    return view;
  }
  view.owner = import_array(table, object, name, access);
  view.tensor = {.data = const_cast<void*>(view.owner.data()),
                 .device = {view.owner.device_type(), view.owner.device_id()},
                 .ndim = static_cast<std::int32_t>(view.owner.ndim()),
                 .dtype = view.owner.dtype(),
                 .shape = const_cast<std::int64_t*>(view.owner.shape_ptr()),
                 .strides = const_cast<std::int64_t*>(view.owner.stride_ptr())};
  return view;
}

std::optional<std::uintptr_t> current_stream(nb::handle object, int device) {
  if (const ExchangeTable* table = table_of(object)) {
    void* stream = nullptr;
    if (table->current_stream(nb::device::cuda::value, device, &stream) == 0) {
      return reinterpret_cast<std::uintptr_t>(stream);
    }
    PyErr_Clear();
  }
  const nb::object handle = nb::module_::import_("bitdecoding.arrays").attr("stream_of")(object);
  if (handle.is_none()) return std::nullopt;
  return nb::cast<std::uintptr_t>(handle);
}

nb::ndarray<> traced_array(const std::vector<std::size_t>& shape,
                           const std::vector<std::int64_t>& strides, int code, int bits,
                           std::optional<int> cuda_device) {
  constexpr std::uintptr_t kAligned = 4096;  // passes every check of an address
  const nb::dlpack::dtype dtype{static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits),
                                1};
  return nb::ndarray<>(reinterpret_cast<void*>(kAligned), shape.size(), shape.data(), nb::handle(),
                       strides.data(), dtype,
                       cuda_device ? nb::device::cuda::value : nb::device::cpu::value,
                       cuda_device.value_or(0));
}

}  // namespace bitdecoding::python
