// SPDX-License-Identifier: Apache-2.0
// Byte offsets inside the record of one (page, KV head): a constexpr function of the KvFormat.
// A record is chunks of 64 tokens in order, so any run of chunks that starts at a K group is one
// contiguous copy. Sections of a chunk, each at a multiple of 16 bytes:
//   | K parameters of groups that begin here | K codes | V codes | V parameters |
//   | K per-token parameters | token norms |            (the last two where the format has them)
#pragma once

#include <cstddef>
#include <cstdint>

#include "bitdecoding/format/kv_format.hpp"

namespace bitdecoding::layout {

inline constexpr int kSectionAlignment_bytes = 16;  // cp.async and bulk copies move 16-byte pieces
inline constexpr int kRecordAlignment_bytes = 128;
inline constexpr int kParameter_bytes = 2;  // fp16
inline constexpr int kExponent_bytes = 1;   // of a block

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

class PageRecord {
 public:
  constexpr explicit PageRecord(const KvFormat& format)
      : format_(format),
        k_codes_(aligned(k_groups_beginning_in(0) * k_group_bytes())),
        v_codes_(k_codes_ + aligned(k_codes_bytes())),
        v_parameters_(v_codes_ + aligned(v_codes_bytes())),
        k_token_parameters_(v_parameters_ + aligned(v_parameters_bytes())),
        token_norms_(k_token_parameters_ + aligned(k_token_parameters_bytes())),
        first_chunk_(token_norms_ + aligned(token_norms_bytes())),
        chunk_stride_(first_chunk_ + aligned(k_groups_beginning_in(1) * k_group_bytes()) -
                      k_codes_) {}

  constexpr const KvFormat& format() const { return format_; }

  // ---- sizes of one section, bytes ----
  constexpr int k_group_bytes() const { return 2 * format_.head_dim * kParameter_bytes; }
  constexpr int k_codes_bytes() const { return codes_bytes(format_.k_bits); }
  constexpr int v_codes_bytes() const { return codes_bytes(format_.v_bits); }
  constexpr int v_parameters_bytes() const { return token_parameters_bytes(format_.v_groups()); }
  constexpr int k_token_parameters_bytes() const {
    return format_.k_axis == KAxis::channel ? 0 : token_parameters_bytes(format_.k_groups());
  }
  constexpr int token_norms_bytes() const {
    return format_.token_norm ? kChunkTokens * kParameter_bytes : 0;
  }

  // Channel-axis K groups whose first token lies in the chunk; 0 for other axes.
  constexpr int k_groups_beginning_in(int chunk) const {
    if (format_.k_axis != KAxis::channel) return 0;
    if (format_.k_group <= kChunkTokens) return kChunkTokens / format_.k_group;
    return chunk * kChunkTokens % format_.k_group == 0 ? 1 : 0;
  }

  // ---- offsets from the start of the record, bytes ----
  constexpr int chunk(int chunk) const {
    return chunk == 0 ? 0 : first_chunk_ + (chunk - 1) * chunk_stride_;
  }
  // Scales of a channel-axis K group, followed by its zeros.
  constexpr int k_group(int group) const {
    const int first = group * format_.k_group / kChunkTokens;
    const int groups_before = first * kChunkTokens / format_.k_group;
    return chunk(first) + (group - groups_before) * k_group_bytes();
  }
  constexpr int k_codes(int chunk) const { return k_codes_ + chunk * chunk_stride_; }
  constexpr int v_codes(int chunk) const { return v_codes_ + chunk * chunk_stride_; }
  constexpr int v_parameters(int chunk) const { return v_parameters_ + chunk * chunk_stride_; }
  constexpr int k_token_parameters(int chunk) const {
    return k_token_parameters_ + chunk * chunk_stride_;
  }
  constexpr int token_norms(int chunk) const { return token_norms_ + chunk * chunk_stride_; }
  // From a section to the same section of the next chunk.
  constexpr int chunk_stride() const { return chunk_stride_; }

  constexpr int page_bytes() const {
    return round_up(chunk(format_.chunks()), kRecordAlignment_bytes);
  }

 private:
  static constexpr int aligned(int bytes) { return round_up(bytes, kSectionAlignment_bytes); }
  constexpr int codes_bytes(int bits) const { return kChunkTokens * format_.head_dim * bits / 8; }
  constexpr int token_parameters_bytes(int groups) const {
    const int of_token = format_.has_blocks() ? kExponent_bytes : 2 * kParameter_bytes;
    return groups * kChunkTokens * of_token;
  }

  KvFormat format_;
  // Offsets of the first chunk's sections, computed once: kernels take them as they are.
  int k_codes_, v_codes_, v_parameters_, k_token_parameters_, token_norms_, first_chunk_;
  // Pages have at most two chunks: one stride serves whether or not the second begins a K group.
  int chunk_stride_;
};

static_assert(PageRecord({.k_bits = 4, .v_bits = 4}).page_bytes() == 17408);
static_assert(PageRecord({.k_bits = 2, .v_bits = 2}).page_bytes() == 9216);
static_assert(PageRecord({.k_axis = KAxis::block, .k_group = 32, .v_group = 32}).page_bytes() ==
              17408);

}  // namespace bitdecoding::layout

namespace bitdecoding {

// Bytes of one (page, KV head) record.
constexpr int page_bytes(const KvFormat& format) { return layout::PageRecord(format).page_bytes(); }

// Stored bits per K or V element, parameters and padding included.
constexpr double bits_per_element(const KvFormat& format) {
  return 8.0 * page_bytes(format) / (2.0 * format.page_tokens * format.head_dim);
}

}  // namespace bitdecoding
