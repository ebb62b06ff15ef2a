// SPDX-License-Identifier: Apache-2.0
// bitdecoding._ext: names and docstrings.
#include <nanobind/nanobind.h>
#include <nanobind/operators.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bitdecoding/layout/page_record.hpp"
#include "cache_arrays.hpp"
#include "decode_plans.hpp"
#include "facts.hpp"
#include "kv_format.hpp"
#include "pack_arrays.hpp"

namespace bitdecoding::python {
namespace {

using nb::literals::operator""_a;
using Stream = std::optional<std::uintptr_t>;  // a cudaStream_t

void bind_kv_format(nb::module_& module) {
  nb::class_<KvFormat>(
      module, "KvFormat", nb::is_final(),
      R"(What the codes of a packed KV cache mean, as one immutable, hashable value.

Everything about a page (size, offsets, kernels) is a function of it; docs/format.md specifies the
bytes. A value is coded as code * scale + zero, with one fp16 scale and zero-point per group; in
blocks as (code - 7.5) * 2^e, with 2 bits (code - 1.5) * 2^e, with one byte for e.

Parameters
----------
k_bits, v_bits : bits per code of K and of V: 2 or 4
k_axis : what shares a K scale: 'channel', k_group tokens of one channel, or 'token', k_group
    channels of one token, or 'block': K and V in blocks of 32 channels of one token
k_group : 32, 64 or 128, at most page_tokens (channel axis) or head_dim (token axis); blocks: 32
v_group : channels of one token that share a V scale: 32, 64 or 128, at most head_dim; blocks: 32
page_tokens : tokens of a page: 64 or 128
head_dim : channels of a head: 64, 128 or 256
token_norm : K is coded divided by its token's norm, which then multiplies the score; not in blocks
k_rotation, v_rotation : channels of a block that a Walsh-Hadamard transform turns, of K (and then
    of every query) and of V (turned back in the output): 0 (none), 16, 64 or 128, at most head_dim.
    Where V's rotation is folded into a model's weights, v_rotation is 0 (QuaRot, arXiv 2404.00456)
k_clip, v_clip : percent of a group's range, about its middle, that the codes span: 50 to 100;
    values beyond become the first or the last code. In blocks 100

Raises ValueError naming the field, its value and what is allowed.)")
      .def_static("__new__", [](nb::handle, const nb::kwargs& f) { return make_kv_format(f); })
      .def(
          "__init__", [](nb::handle, const nb::kwargs&) {},
          nb::sig("def __init__(self, *, k_bits: int = 4, v_bits: int = 4, "
                  "k_axis: str = 'channel', k_group: int = 128, v_group: int = 128, "
                  "page_tokens: int = 128, head_dim: int = 128, token_norm: bool = False, "
                  "k_rotation: int = 0, v_rotation: int = 0, k_clip: int = 100, "
                  "v_clip: int = 100) -> None"))
      .def_static("parse", &parse, "name"_a.none(), nb::sig("def parse(name: str) -> KvFormat"),
                  "The format of a canonical name such as 'k4v2_c128_v64_p128_d128' or "
                  "'k2v2_t32_v32_p64_d64_norm_kr64_vr64'. Raises ValueError.")
      .def_static(
          "recommended", &recommended, nb::kw_only(), "bits"_a.none(), "head_dim"_a.none(),
          nb::sig("def recommended(*, bits: int, head_dim: int) -> KvFormat"),
          R"(The format to begin with: docs/accuracy.md has what it loses on models and texts.

Parameters
----------
bits : 4, 3 (K in 4 bits, V in 2) or 2: per code; bits_per_element of the result counts scales too
head_dim : channels of a head of K and V: 64, 128 or 256

Measured with caches that keep the first 16 and the newest 64 tokens in 16 bit, their defaults.
Raises ValueError or TypeError naming the argument, its value and what is allowed.)")
      .def_ro("k_bits", &KvFormat::k_bits, "Bits per K code.")
      .def_ro("v_bits", &KvFormat::v_bits, "Bits per V code.")
      .def_prop_ro("k_axis", &axis_name, "'channel', 'token' or 'block'.")
      .def_ro("k_group", &KvFormat::k_group, "Tokens (channel axis) or channels per K scale.")
      .def_ro("v_group", &KvFormat::v_group, "Channels per V scale.")
      .def_ro("page_tokens", &KvFormat::page_tokens, "Tokens of a page.")
      .def_ro("head_dim", &KvFormat::head_dim, "Channels of a head.")
      .def_ro("token_norm", &KvFormat::token_norm, "Whether K is coded divided by its norm.")
      .def_ro("k_rotation", &KvFormat::k_rotation,
              "Channels of a block of K that is turned; 0: none.")
      .def_ro("v_rotation", &KvFormat::v_rotation, "The same of V.")
      .def_ro("k_clip", &KvFormat::k_clip, "Percent of a K group's range that its codes span.")
      .def_ro("v_clip", &KvFormat::v_clip, "Percent of a V group's range that its codes span.")
      .def_prop_ro(
          "bits_per_element", [](const KvFormat& f) { return bits_per_element(f); },
          "Stored bits per K or V element, scales, zero-points and padding included.")
      .def(
          "page_bytes", [](const KvFormat& f) { return page_bytes(f); },
          "Bytes of the record of one page and one KV head.")
      .def("__str__", [](const KvFormat& f) { return name(f); })
      .def("__repr__", &repr)
      .def(nb::self == nb::self, nb::sig("def __eq__(self, arg: object, /) -> bool"))
      .def("__hash__", [](const KvFormat& f) { return std::hash<KvFormat>{}(f); })
      .def("__reduce__", &reduce, nb::sig("def __reduce__(self) -> tuple[typing.Any, ...]"));
}

void bind_cache_arrays(nb::module_& module) {
  nb::class_<CacheArrays>(module, "CacheArrays",
                          "The checked arrays of a PagedKvCache and its compiled operations.")
      .def(
          "__init__",
          [](CacheArrays* self, const KvFormat& format, int keep_first, int keep_last,
             nb::handle pool, nb::handle side, nb::handle block_table, nb::handle slots,
             nb::handle lengths, nb::handle packed, nb::handle k_mean, bool keep) {
            new (self)
                CacheArrays(format, keep_first, keep_last, pool, side, block_table, slots, lengths,
                            packed, k_mean, keep ? Lifetime::longer : Lifetime::call);
          },
          "format"_a, nb::kw_only(), "keep_first"_a, "keep_last"_a, "pool"_a.none(),
          "side"_a.none(), "block_table"_a.none(), "slots"_a.none(), "lengths"_a.none(),
          "packed"_a.none(), "k_mean"_a.none() = nb::none(), "keep"_a = true,
          "keep = False: used only while the caller holds the arrays and nobody resizes them.")
      .def_prop_ro("device", &CacheArrays::device)
      .def_prop_ro("capacity_tokens", &CacheArrays::capacity_tokens)
      .def(
          "append",
          [](CacheArrays& self, nb::handle k, nb::handle v, nb::handle leftpad,
             nb::handle num_tokens, int max_tokens, int threads, Stream stream, bool checks_only) {
            self.append(k, v, leftpad, num_tokens, max_tokens,
                        {.threads = threads, .stream = stream, .checks_only = checks_only});
          },
          "k"_a.none(), "v"_a.none(), nb::kw_only(), "leftpad"_a.none(), "num_tokens"_a.none(),
          "max_tokens"_a, "threads"_a, "stream"_a.none(), "checks_only"_a = false)
      .def(
          "decode",
          [](CacheArrays& self, nb::handle q, nb::handle out, nb::handle lse, double softmax_scale,
             int threads, Stream stream, std::optional<std::string> kernel, bool checks_only) {
            self.decode(q, out, lse, softmax_scale,
                        {.threads = threads,
                         .stream = stream,
                         .kernel = std::move(kernel),
                         .checks_only = checks_only});
          },
          "q"_a.none(), "out"_a.none(), nb::kw_only(), "lse"_a.none(), "softmax_scale"_a,
          "threads"_a, "stream"_a.none(), "kernel"_a.none(), "checks_only"_a = false)
      .def("check", &CacheArrays::check, "block_table"_a, "slots"_a, "lengths"_a, "packed"_a)
      .def("use_workspace", &CacheArrays::use_workspace, "workspace"_a)
      .def_prop_ro("error_word", &CacheArrays::error_word)
      .def("plan_decode", &CacheArrays::plan_decode, "columns"_a, nb::kw_only(), "kernel"_a.none(),
           nb::sig("def plan_decode(self, columns: int, *, kernel: str | None) "
                   "-> dict[str, typing.Any]"));
  module.def("sequence_extents", &sequence_extents, "format"_a, nb::kw_only(), "keep_first"_a,
             "keep_last"_a, "max_tokens"_a,
             nb::sig("def sequence_extents(format: KvFormat, *, keep_first: int, keep_last: int, "
                     "max_tokens: int) -> tuple[int, int]"),
             "Pages, and rows of the tail ring, that a sequence of up to max_tokens tokens needs. "
             "Raises ValueError for zones that no cache of the format has.");
}

void bind_functions(nb::module_& module) {
  module.def(
      "pack_arrays",
      [](nb::handle k, nb::handle v, nb::handle pool, nb::handle block_table,
         const KvFormat& format, int keep_first, nb::handle first_page, nb::handle leftpad,
         nb::handle num_tokens, nb::handle k_mean, int threads, Stream stream,
         nb::handle error_word, bool checks_only) {
        pack_arrays(k, v, pool, block_table, format, keep_first, first_page, leftpad, num_tokens,
                    k_mean, {.threads = threads, .stream = stream, .checks_only = checks_only},
                    error_word);
      },
      "k"_a.none(), "v"_a.none(), "pool"_a.none(), "block_table"_a.none(), nb::kw_only(),
      "format"_a, "keep_first"_a, "first_page"_a.none(), "leftpad"_a.none(), "num_tokens"_a.none(),
      "k_mean"_a.none() = nb::none(), "threads"_a, "stream"_a.none(), "error_word"_a.none(),
      "checks_only"_a = false,
      "bitdecoding.pack_pages, with an error word that the caller supplies.");
  module.def(
      "plan_decode",
      [](const KvFormat& format, int columns, int device) {
        return plan_facts(decode_plan(format, columns, std::nullopt, device));
      },
      "format"_a, nb::kw_only(), "columns"_a, "device"_a,
      nb::sig("def plan_decode(format: KvFormat, *, columns: int, device: int) "
              "-> dict[str, typing.Any]"),
      "PagedKvCache.plan_decode for a CUDA device, without a cache.");
  module.def("decode_kernel", &decode_kernel, "format"_a, "columns"_a, nb::kw_only(),
             "compute_capability"_a,
             "bitdecoding.plan.decode_kernel, of arguments that fit an int.");
  module.def("traced_array", &traced_array, nb::rv_policy::reference, "shape"_a, nb::kw_only(),
             "strides"_a, "code"_a, "bits"_a, "cuda_device"_a.none(),
             nb::sig("def traced_array(shape: list[int], *, strides: list[int], code: int, "
                     "bits: int, cuda_device: int | None) -> typing.Any"),
             "An array without memory, for calls with checks_only; code, bits: of its dtype in "
             "DLPack.");
}

}  // namespace
}  // namespace bitdecoding::python

NB_MODULE(_ext, module) {
  using namespace bitdecoding::python;
  nb::set_leak_warnings(false);  // a format alive at exit, in a cache say, is nobody's mistake
  module.doc() = "The compiled part of bitdecoding: formats, cache operations, facts of the build.";
  bind_kv_format(module);
  bind_cache_arrays(module);
  bind_functions(module);
  module.def("build_info", &build_facts, nb::sig("def build_info() -> dict[str, typing.Any]"),
             R"(Where this build comes from and what it holds.

Keys: version, format_version (an int, of the bytes of pages: docs/format.md), git, compiler, cuda
(version of the CUDA compiler, None without kernels), architectures (list), kernels (list of names),
cuda_driver (newest CUDA version that the installed driver serves, None without a driver or
kernels). Creates no CUDA context.)");
}
