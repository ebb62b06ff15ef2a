// SPDX-License-Identifier: Apache-2.0
// KvFormat's constructor, parser, recommendations and texts, with the library's own messages.
#include "kv_format.hpp"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <iterator>

#include "arrays.hpp"
#include "bitdecoding/format/recommended.hpp"

namespace bitdecoding::python {

namespace {

struct IntField {
  const char* name;
  int KvFormat::* field;
};

constexpr IntField kIntFields[] = {
    {"k_bits", &KvFormat::k_bits},           {"v_bits", &KvFormat::v_bits},
    {"k_group", &KvFormat::k_group},         {"v_group", &KvFormat::v_group},
    {"page_tokens", &KvFormat::page_tokens}, {"head_dim", &KvFormat::head_dim},
    {"k_rotation", &KvFormat::k_rotation},   {"v_rotation", &KvFormat::v_rotation},
    {"k_clip", &KvFormat::k_clip},           {"v_clip", &KvFormat::v_clip},
};

constexpr const char* kAxisNames[] = {"channel", "token", "block"};  // in KAxis' order
constexpr const char* kAxes = "'channel', 'token', 'block'";

[[noreturn]] void refuse_field(const std::string& name, nb::handle value, const char* allowed) {
  refuse_type(name, " = ", nb::repr(value).c_str(), "; allowed: ", allowed);
}

// std::string, int or bool
template <class Value>
Value field_value(const std::string& name, nb::handle value, const char* allowed) {
  Value result;
  if (!nb::try_cast(value, result)) refuse_field(name, value, allowed);
  return result;
}

void set_field(const std::string& name, nb::handle value, KvFormat* format) {
  for (const IntField& known : kIntFields) {
    if (name != known.name) continue;
    format->*known.field = field_value<int>(name, value, "an int");
    return;
  }
  if (name == "token_norm") {
    format->token_norm = field_value<bool>(name, value, "a bool");
  } else if (name == "k_axis") {
    const auto axis = field_value<std::string>(name, value, kAxes);
    const auto known = std::find(std::begin(kAxisNames), std::end(kAxisNames), axis);
    if (known == std::end(kAxisNames)) refuse_value("k_axis = '", axis, "'; allowed: ", kAxes);
    format->k_axis = static_cast<KAxis>(known - std::begin(kAxisNames));
  } else {
    refuse_field(name, value,
                 "k_bits, v_bits, k_axis, k_group, v_group, page_tokens, head_dim, token_norm, "
                 "k_rotation, v_rotation, k_clip, v_clip");
  }
}

}  // namespace

KvFormat make_kv_format(const nb::kwargs& fields) {
  KvFormat format;
  for (const auto& [name, value] : fields) set_field(nb::cast<std::string>(name), value, &format);
  throw_if_error(validate(format));
  return format;
}

KvFormat parse(nb::handle name) {
  KvFormat format;
  const auto text = field_value<std::string>("name", name, "a str");
  throw_if_error(parse_kv_format(text, &format));
  return format;
}

KvFormat recommended(nb::handle bits, nb::handle head_dim) {
  KvFormat format;
  const int wanted = field_value<int>("bits", bits, "2, 3, 4");
  throw_if_error(
      recommended_format(wanted, field_value<int>("head_dim", head_dim, "an int"), &format));
  return format;
}

std::string axis_name(const KvFormat& format) {
  return kAxisNames[static_cast<int>(format.k_axis)];
}

std::string repr(const KvFormat& format) { return "KvFormat.parse('" + name(format) + "')"; }

// Unpickled as methodcaller('parse', name)(KvFormat): a bound static method can't be pickled.
nb::tuple reduce(const KvFormat& format) {
  const nb::object call =
      nb::module_::import_("operator").attr("methodcaller")("parse", name(format));
  return nb::make_tuple(call, nb::make_tuple(nb::type<KvFormat>()));
}

}  // namespace bitdecoding::python
