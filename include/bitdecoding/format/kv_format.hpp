// SPDX-License-Identifier: Apache-2.0
// KvFormat: what the codes of a packed KV cache mean, as one value. Everything about a page (sizes,
// offsets, layouts, kernels) is a function of it. `why_invalid` is the only statement of its rules.
//   canonical name   k4v2_c128_v64_p128_d128[_norm][_kr64][_vr64][_kclip85][_vclip80]
//                    (t64, not c128: K groups along channels; b32 and v32: K and V in blocks)
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <sstream>
#include <string>
#include <string_view>

#include "bitdecoding/status.hpp"

namespace bitdecoding {

// Of the bytes that docs/format.md specifies. It rises when pages of the version before it would be
// read wrongly.
inline constexpr int kFormatVersion = 1;
// Tokens of one chunk: the granule of a page record, of the zones and of the decode pipeline.
inline constexpr int kChunkTokens = 64;
// Channels that share a scale, at most: heads of 256 have two such groups.
inline constexpr int kMostGroupChannels = 128;

// Which elements of K share a scale and a zero-point.
enum class KAxis : std::uint8_t {
  channel,  // k_group tokens of one channel (KIVI's choice; outlier channels keep their own scale)
  token,    // k_group channels of one token
  block,    // 32 channels of one token, and so V: a power of two, symmetric codes, no zero-point
};

struct KvFormat {
  int k_bits = 4;
  int v_bits = 4;
  KAxis k_axis = KAxis::channel;
  int k_group = 128;        // tokens (channel axis) or channels (token axis) per K scale
  int v_group = 128;        // channels per V scale; V scales always belong to one token
  int page_tokens = 128;    // P
  int head_dim = 128;       // D
  bool token_norm = false;  // K is stored divided by the token's norm, which multiplies the score
  int k_rotation = 0;       // channels of a Walsh-Hadamard block of K and of queries; 0: none
  int v_rotation = 0;       // the same of V, undone on the output (format/rotation.hpp)
  int k_clip = 100;         // percent of a group's range that the codes span, about its middle:
  int v_clip = 100;         // at 2 bits, outliers cost less than steps that reach for them

  friend constexpr bool operator==(const KvFormat&, const KvFormat&) = default;

  constexpr bool has_blocks() const { return k_axis == KAxis::block; }
  constexpr int chunks() const { return page_tokens / kChunkTokens; }
  constexpr int v_groups() const { return head_dim / v_group; }
  // K groups of a page along the grouped axis: token runs of a page, or channel runs of a token.
  constexpr int k_groups() const {
    return (k_axis == KAxis::channel ? page_tokens : head_dim) / k_group;
  }
};

namespace format {

// Largest code of a width: 15 or 3.
constexpr int max_code(int bits) { return (1 << bits) - 1; }

// One broken rule: the field, its value and what it may be. `field == nullptr`: none is broken.
struct BrokenRule {
  const char* field = nullptr;
  int value = 0;
  const char* allowed = "";
};

constexpr bool is_channel_group(int group, int head_dim) {
  return (group == 32 || group == 64 || group == kMostGroupChannels) && group <= head_dim;
}

constexpr bool is_rotation(int block, int head_dim) {
  return block == 0 || ((block == 16 || block == 64 || block == 128) && block <= head_dim);
}

constexpr BrokenRule why_invalid(const KvFormat& f) {
  if (f.k_bits != 2 && f.k_bits != 4) return {"k_bits", f.k_bits, "2, 4"};
  if (f.v_bits != 2 && f.v_bits != 4) return {"v_bits", f.v_bits, "2, 4"};
  if (f.head_dim != 64 && f.head_dim != 128 && f.head_dim != 256) {
    return {"head_dim", f.head_dim, "64, 128, 256"};
  }
  if (f.page_tokens != 64 && f.page_tokens != 128) {
    return {"page_tokens", f.page_tokens, "64, 128"};
  }
  if (f.k_axis == KAxis::channel) {
    const bool known = f.k_group == 32 || f.k_group == 64 || f.k_group == 128;
    if (!known || f.k_group > f.page_tokens) {
      return {"k_group", f.k_group, "32, 64, 128 tokens, at most page_tokens (K per channel)"};
    }
  } else if (f.k_axis == KAxis::token) {
    if (!is_channel_group(f.k_group, f.head_dim)) {
      return {"k_group", f.k_group, "32, 64, 128 channels, at most head_dim (K per token)"};
    }
  } else if (f.has_blocks()) {
    if (f.k_group != 32) return {"k_group", f.k_group, "32 channels (blocks)"};
    if (f.v_group != 32) return {"v_group", f.v_group, "32 channels (blocks)"};
    // An exponent follows its token's magnitude already, and blocks have limits of their own.
    if (f.token_norm) return {"token_norm", 1, "0, which is false (blocks)"};
    if (f.k_clip != 100) return {"k_clip", f.k_clip, "100 (blocks)"};
    if (f.v_clip != 100) return {"v_clip", f.v_clip, "100 (blocks)"};
  } else {
    return {"k_axis", static_cast<int>(f.k_axis), "channel, token, block"};
  }
  if (!is_channel_group(f.v_group, f.head_dim)) {
    return {"v_group", f.v_group, "32, 64, 128 channels, at most head_dim"};
  }
  constexpr const char* kRotations = "0, 16, 64, 128 channels, at most head_dim";
  if (!is_rotation(f.k_rotation, f.head_dim)) return {"k_rotation", f.k_rotation, kRotations};
  if (!is_rotation(f.v_rotation, f.head_dim)) return {"v_rotation", f.v_rotation, kRotations};
  if (f.k_clip < 50 || f.k_clip > 100) return {"k_clip", f.k_clip, "50 to 100 percent"};
  if (f.v_clip < 50 || f.v_clip > 100) return {"v_clip", f.v_clip, "50 to 100 percent"};
  return {};
}

constexpr bool is_valid(const KvFormat& f) { return why_invalid(f).field == nullptr; }

}  // namespace format

inline Status validate(const KvFormat& f) {
  const format::BrokenRule rule = format::why_invalid(f);
  if (rule.field == nullptr) return {};
  return invalid_argument(rule.field, " = ", rule.value, "; allowed: ", rule.allowed);
}

// The canonical name. Defined for every value, valid or not, so that messages can print it.
inline std::string name(const KvFormat& f) {
  std::ostringstream text;
  const char axis = f.has_blocks() ? 'b' : f.k_axis == KAxis::channel ? 'c' : 't';
  text << 'k' << f.k_bits << 'v' << f.v_bits << '_' << axis << f.k_group << "_v" << f.v_group
       << "_p" << f.page_tokens << "_d" << f.head_dim << (f.token_norm ? "_norm" : "");
  if (f.k_rotation != 0) text << "_kr" << f.k_rotation;
  if (f.v_rotation != 0) text << "_vr" << f.v_rotation;
  if (f.k_clip != 100) text << "_kclip" << f.k_clip;
  if (f.v_clip != 100) text << "_vclip" << f.v_clip;
  return text.str();
}

// Reads a canonical name; on an error `*result` is untouched.
inline Status parse_kv_format(std::string_view text, KvFormat* result) {
  const Status malformed =
      invalid_argument("format = '", text,
                       "'; allowed: k<bits>v<bits>_<c|t|b><group>_v<group>_p<tokens>_d<channels>"
                       "[_norm][_kr<channels>][_vr<channels>][_kclip<percent>][_vclip<percent>], "
                       "for example "
                       "k4v2_c128_v64_p128_d128");
  std::string_view rest = text;
  const auto literal = [&rest](std::string_view word) {
    if (!rest.starts_with(word)) return false;
    rest.remove_prefix(word.size());
    return true;
  };
  const auto number = [&rest](int* value) {
    if (rest.empty() || rest.front() < '1' || rest.front() > '9') return false;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), *value);
    if (error != std::errc{}) return false;
    rest.remove_prefix(static_cast<std::size_t>(end - rest.data()));
    return true;
  };

  KvFormat f;
  if (!literal("k") || !number(&f.k_bits)) return malformed;
  if (!literal("v") || !number(&f.v_bits)) return malformed;
  if (literal("_c")) {
    f.k_axis = KAxis::channel;
  } else if (literal("_t")) {
    f.k_axis = KAxis::token;
  } else if (literal("_b")) {
    f.k_axis = KAxis::block;
  } else {
    return malformed;
  }
  if (!number(&f.k_group)) return malformed;
  if (!literal("_v") || !number(&f.v_group)) return malformed;
  if (!literal("_p") || !number(&f.page_tokens)) return malformed;
  if (!literal("_d") || !number(&f.head_dim)) return malformed;
  f.token_norm = literal("_norm");
  if (literal("_kr") && !number(&f.k_rotation)) return malformed;
  if (literal("_vr") && !number(&f.v_rotation)) return malformed;
  if (literal("_kclip") && !number(&f.k_clip)) return malformed;
  if (literal("_vclip") && !number(&f.v_clip)) return malformed;
  if (!rest.empty() || name(f) != text) return malformed;  // one name each: no _kclip100
  if (Status status = validate(f); !status.is_ok()) return status;
  *result = f;
  return {};
}

}  // namespace bitdecoding

template <>
struct std::hash<bitdecoding::KvFormat> {
  std::size_t operator()(const bitdecoding::KvFormat& f) const noexcept {
    std::size_t hash = 0;
    for (const int field : {f.k_bits, f.v_bits, static_cast<int>(f.k_axis), f.k_group, f.v_group,
                            f.page_tokens, f.head_dim, static_cast<int>(f.token_norm), f.k_rotation,
                            f.v_rotation, f.k_clip, f.v_clip}) {
      hash = (hash ^ static_cast<std::size_t>(field)) * 0x100000001b3u;  // FNV-1a's prime
    }
    return hash;
  }
};
