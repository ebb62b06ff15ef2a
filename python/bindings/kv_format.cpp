// SPDX-License-Identifier: Apache-2.0
// KvFormat's constructor, parser and texts, with the library's own messages.
#include "kv_format.hpp"

#include <nanobind/stl/string.h>

#include "arrays.hpp"

namespace bitdecoding::python {

KvFormat make_kv_format(int k_bits, int v_bits, std::string_view k_axis, int k_group, int v_group,
                        int page_tokens, int head_dim, bool token_norm) {
  if (k_axis != "channel" && k_axis != "token") {
    refuse_value("k_axis = '", k_axis, "'; allowed: 'channel', 'token'");
  }
  const KvFormat format{.k_bits = k_bits,
                        .v_bits = v_bits,
                        .k_axis = k_axis == "channel" ? KAxis::channel : KAxis::token,
                        .k_group = k_group,
                        .v_group = v_group,
                        .page_tokens = page_tokens,
                        .head_dim = head_dim,
                        .token_norm = token_norm};
  throw_if_error(validate(format));
  return format;
}

KvFormat parse(std::string_view name) {
  KvFormat format;
  throw_if_error(parse_kv_format(name, &format));
  return format;
}

std::string axis_name(const KvFormat& format) {
  return format.k_axis == KAxis::channel ? "channel" : "token";
}

std::string repr(const KvFormat& format) { return "KvFormat.parse('" + name(format) + "')"; }

// Unpickled as methodcaller('parse', name)(KvFormat): a bound static method can't be pickled.
nb::tuple reduce(const KvFormat& format) {
  const nb::object call =
      nb::module_::import_("operator").attr("methodcaller")("parse", name(format));
  return nb::make_tuple(call, nb::make_tuple(nb::type<KvFormat>()));
}

}  // namespace bitdecoding::python
