// SPDX-License-Identifier: Apache-2.0
// What decode_kernel and stages are asked to time, what that must read, and how often: pure, tested
// on the host. The rules are those of decode_cases.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <string>
#include <vector>

#include "bitdecoding/cache/paged_kv_cache.hpp"

namespace bitdecoding::bench {

// Decode of one query token per sequence, written BxHxG@L.
struct Case {
  int batch = 0;     // B
  int heads_kv = 0;  // H
  int group = 0;     // G: query heads per KV head
  int length = 0;    // L: tokens of every sequence
};

struct Request {
  std::string kernel;  // a row of the kernel table
  KvFormat format;
  int keep_first = 16;
  int keep_last = 64;
  std::vector<Case> cases;
};

// The format of the row's page with the largest groups.
inline Status format_of_kernel(const std::string& kernel, KvFormat* format) {
  KvFormat f;
  char axis = 0;
  int arch = 0, columns = 0, end = 0;
  const int found = std::sscanf(kernel.c_str(), "decode_sm%d_k%dv%d_%c_d%d_n%d%n", &arch, &f.k_bits,
                                &f.v_bits, &axis, &f.head_dim, &columns, &end);
  const bool known = axis == 'c' || axis == 't' || axis == 'b';
  if (found != 6 || end != static_cast<int>(kernel.size()) || !known) {
    return invalid_argument(
        "kernel = '", kernel,
        "'; allowed: decode_<arch>_k<bits>v<bits>_<c|t|b>_d<channels>_n<columns>,"
        " for example decode_sm90_k4v4_c_d128_n8");
  }
  f.k_axis = axis == 'c' ? KAxis::channel : axis == 't' ? KAxis::token : KAxis::block;
  f.v_group = axis == 'b' ? 32 : std::min(f.head_dim, kMostGroupChannels);
  f.k_group = axis == 'c' ? f.page_tokens : f.v_group;
  if (Status status = validate(f); !status.is_ok()) return status;
  *format = f;
  return {};
}

inline Status parse_case(const std::string& text, Case* result) {
  Case c;
  int end = 0;
  const int found =
      std::sscanf(text.c_str(), "%dx%dx%d@%d%n", &c.batch, &c.heads_kv, &c.group, &c.length, &end);
  if (found != 4 || end != static_cast<int>(text.size()) ||
      std::min({c.batch, c.heads_kv, c.group, c.length}) < 1) {
    return invalid_argument("case = '", text,
                            "'; allowed: batch x KV heads x group @ tokens: 8x8x4@4096");
  }
  *result = c;
  return {};
}

inline Status parse_zones(const std::string& text, Request* request) {
  int first = 0, newest = 0, end = 0;
  const int found = std::sscanf(text.c_str(), "%d/%d%n", &first, &newest, &end);
  if (found != 2 || end != static_cast<int>(text.size()) || std::min(first, newest) < 0) {
    return invalid_argument("zones = '", text, "'; allowed: first tokens / newest tokens: 16/64");
  }
  request->keep_first = first;
  request->keep_last = newest;
  return {};
}

// `arguments`: the kernel, then cases, and where wanted zones and a format, told by their shape.
inline Status parse_request(const std::vector<std::string>& arguments, Request* result) {
  if (arguments.empty()) return invalid_argument("kernel = ''; allowed: a row of the kernel table");
  Request r;
  r.kernel = arguments[0];
  if (Status status = format_of_kernel(r.kernel, &r.format); !status.is_ok()) return status;
  for (std::size_t i = 1; i < arguments.size(); ++i) {
    const std::string& text = arguments[i];
    Status status;
    if (text.find('/') != std::string::npos) {
      status = parse_zones(text, &r);
    } else if (text.starts_with('k')) {
      status = parse_kv_format(text, &r.format);
    } else {
      status = parse_case(text, &r.cases.emplace_back());
    }
    if (!status.is_ok()) return status;
  }
  if (r.cases.empty()) return invalid_argument("no case; allowed: one or more, as in 8x8x4@4096");
  *result = r;
  return {};
}

// What `stages` times where no format is named.
inline constexpr const char* kStageFormats[] = {
    "k4v4_c128_v128_p128_d128", "k4v2_c128_v128_p128_d128", "k2v2_c128_v128_p128_d128",
    "k2v2_c32_v32_p128_d128"};

// `arguments`: cases, and where wanted zones and formats. A request without kernel for each format.
inline Status parse_stage_requests(const std::vector<std::string>& arguments,
                                   std::vector<Request>* result) {
  Request all;
  std::vector<std::string> formats;
  for (const std::string& text : arguments) {
    Status status;
    if (text.find('/') != std::string::npos) {
      status = parse_zones(text, &all);
    } else if (text.starts_with('k')) {
      formats.push_back(text);
    } else {
      status = parse_case(text, &all.cases.emplace_back());
    }
    if (!status.is_ok()) return status;
  }
  if (all.cases.empty()) return invalid_argument("no case; allowed: one or more, as in 8x8x4@4096");
  if (formats.empty()) formats.assign(std::begin(kStageFormats), std::end(kStageFormats));
  for (const std::string& format : formats) {
    Request& request = result->emplace_back(all);
    if (Status status = parse_kv_format(format, &request.format); !status.is_ok()) return status;
  }
  return {};
}

// Bytes of queries and outputs of one call, fp16.
inline std::int64_t query_bytes(const Case& c, int head_dim) {
  return std::int64_t{4} * c.batch * c.heads_kv * c.group * head_dim;
}

// Bytes that one call must move once: whole pages with a token that is read from them, rows of both
// 16-bit zones, queries, outputs.
inline std::int64_t decode_bytes(const Case& c, const Request& r) {
  const int page = r.format.page_tokens;
  const int packed = packed_tokens(c.length, r.keep_last, page, 0);
  const int first = std::min(r.keep_first, packed);
  const std::int64_t pages = packed / page - first / page;
  const std::int64_t zone_tokens = first + c.length - packed;
  const std::int64_t head = pages * page_bytes(r.format) + zone_tokens * 2 * 2 * r.format.head_dim;
  return std::int64_t{c.batch} * c.heads_kv * head + query_bytes(c, r.format.head_dim);
}

inline constexpr std::int64_t kLargeBytes = std::int64_t{24} << 30;  // twice as much may not fit

// Caches to take turns through: 4x the L2 lies between two reads of the same byte.
inline int copies_needed(std::int64_t moved, std::int64_t l2_bytes) {
  if (moved > kLargeBytes) return 1;  // hundreds of times the L2
  return static_cast<int>(1 + std::max<std::int64_t>(1, (4 * l2_bytes + moved - 1) / moved));
}

// Launches of a graph: every copy equally often, 20 or more.
inline int launches_needed(int copies) { return (20 + copies - 1) / copies * copies; }

}  // namespace bitdecoding::bench
