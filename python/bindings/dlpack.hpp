// SPDX-License-Identifier: Apache-2.0
// What DLPack gives of an array: where it lies, its shape and the stream that its library works on.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace bitdecoding::python {

namespace nb = nanobind;

enum class Access { read, write };
// How long a view is used: within a call, whose caller holds the object and its shape, or longer.
enum class Lifetime { call, longer };

struct ArrayView {
  nb::dlpack::dltensor tensor;  // with strides, in elements; no byte_offset
  nb::ndarray<nb::ro> owner;    // nothing where the caller's object is enough
};

// TypeError or ValueError where `object`, the argument `name`, isn't an array that can be
// `access`ed.
ArrayView view_array(nb::handle object, const char* name, Access access, Lifetime lifetime);

// The stream on which the library of `object`, an array on that CUDA device, now works; nothing
// where it doesn't say.
std::optional<std::uintptr_t> current_stream(nb::handle object, int device);

// An array without memory, for checks alone. `code`, `bits`: DLPack's dtype.
nb::ndarray<> traced_array(const std::vector<std::size_t>& shape,
                           const std::vector<std::int64_t>& strides, int code, int bits,
                           std::optional<int> cuda_device);

}  // namespace bitdecoding::python
