// SPDX-License-Identifier: Apache-2.0
// Umbrella of the public interface: formats, cache views, problems and the compiled operations.
// It needs neither CUDA nor CuTe headers; kernel authors include layout/, *_launch.cuh and
// decode/launch.cuh too.
#pragma once

#include "bitdecoding/cache/paged_kv_cache.hpp"     // IWYU pragma: export
#include "bitdecoding/decode/decode_problem.hpp"    // IWYU pragma: export
#include "bitdecoding/format/kv_format.hpp"         // IWYU pragma: export
#include "bitdecoding/format/recommended.hpp"       // IWYU pragma: export
#include "bitdecoding/layout/page_record.hpp"       // IWYU pragma: export
#include "bitdecoding/quantize/append_problem.hpp"  // IWYU pragma: export
#include "bitdecoding/quantize/pack_problem.hpp"    // IWYU pragma: export
#include "bitdecoding/run.hpp"                      // IWYU pragma: export
#include "bitdecoding/status.hpp"                   // IWYU pragma: export
#include "bitdecoding/version.hpp"                  // IWYU pragma: export
