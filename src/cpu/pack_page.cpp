// SPDX-License-Identifier: Apache-2.0
#include "cpu/pack_page.hpp"

#include <algorithm>
#include <cstring>

#include "bitdecoding/layout/packed_kv_tensor.hpp"
#include "cpu/encode.hpp"
#include "cpu/page_dispatch.hpp"

namespace bitdecoding::cpu {
namespace {

using cutlass::half_t;
using format::GroupCoder;
using format::GroupParameters;
using format::GroupRange;

constexpr int kMinChannelGroup = 32;

// Codes of one tensor of a page, rows of head_dim * bits / 8 bytes in a CodeOrder.
using CodeBytes = std::uint8_t[kMaxPageTokens * kMaxHeadDim / 2];

// What stores a group's parameters and gives its coder: (token, channel, range). All tensors (N,D).
template <int Bits, class Scales, class Zeros>
auto storing(const Scales& scales, const Zeros& zeros, int clip) {
  return [=, margin = format::clip_margin(clip)](int token, int channel, const GroupRange& range) {
    const GroupParameters parameters = format::group_parameters(range, Bits, margin);
    scales(token, channel) = half_t::bitcast(parameters.scale);
    zeros(token, channel) = half_t::bitcast(parameters.zero);
    return GroupCoder(parameters);
  };
}
template <int Bits, class Exponents>
auto storing(const Exponents& exponents) {
  return [=](int token, int channel, const GroupRange& range) {
    const std::uint8_t exponent = format::block_exponent(range, Bits);
    exponents(token, channel) = exponent;
    return GroupCoder(format::block_parameters(exponent, Bits));
  };
}

// Groups of `group` tokens of one channel.
template <int Bits, int HeadDim, class Store>
void code_by_channel(const TokenTile& tile, int tokens, int group, int free_tokens,
                     const Store& store, std::uint8_t* bytes) {
  GroupRange ranges[HeadDim];
  for (int first = 0; first < tokens; first += group) {
    const int counted = std::clamp(free_tokens, first, first + group);
    channel_ranges(tile.values + counted * HeadDim, first + group - counted, HeadDim, ranges);
    ChannelCoders coders;
    for (int c = 0; c < HeadDim; ++c) {
      coders.set(c, store(first, c, ranges[c]));
    }
    for (int n = first; n < first + group; ++n) {
      encode_channels(tile.values + n * HeadDim, coders, HeadDim, Bits,
                      bytes + n * (HeadDim * Bits / 8));
    }
  }
}

// Groups of `group` channels of one token.
template <int Bits, int HeadDim, CodeOrder Order, class Store>
void code_by_token(const TokenTile& tile, int tokens, int group, const Store& store,
                   std::uint8_t* bytes) {
  GroupCoder coders[HeadDim / kMinChannelGroup];
  for (int n = 0; n < tokens; ++n) {
    const std::uint16_t* values = tile.values + n * HeadDim;
    for (int c = 0; c < HeadDim; c += group) {
      coders[c / group] = store(n, c, token_range(values + c, group));
    }
    encode_groups(values, coders, group, HeadDim, Bits, Order, bytes + n * (HeadDim * Bits / 8));
  }
}

// A word holds bytes (h, u) = (0,0) (0,1) (1,0) (1,1), lowest first.
std::uint32_t word_of(std::uint8_t h0u0, std::uint8_t h0u1, std::uint8_t h1u0, std::uint8_t h1u1) {
  return static_cast<std::uint32_t>(h0u0) | static_cast<std::uint32_t>(h0u1) << 8 |
         static_cast<std::uint32_t>(h1u0) << 16 | static_cast<std::uint32_t>(h1u1) << 24;
}

template <class Page>
void store_k_units(const Page& page, const std::uint8_t* bytes) {
  using K = typename Page::K;
  constexpr int kRow = K::block_words * 8;  // bytes of one token
  for (int chunk = 0; chunk < page.record().format().chunks(); ++chunk) {
    const auto units = page.k_units(chunk);  // (lane,unit,block)
    for (int block = 0; block < layout::kChunkBlocks; ++block) {
      for (int lane = 0; lane < layout::kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const int token = chunk * kChunkTokens + block * layout::kBlockTokens + g;
        for (int word = 0; word < K::block_words; ++word) {
          const int r = word % 2;
          const std::uint8_t* at = bytes + (token + 8 * r) * kRow + word / 2 * 16 + 2 * t;
          units(lane, word / K::k_unit_words, block).word[word % K::k_unit_words] =
              word_of(at[0], at[8], at[1], at[9]);
        }
      }
    }
  }
}

template <class Page>
void store_v_units(const Page& page, const std::uint8_t* bytes) {
  using V = typename Page::V;
  constexpr int kRow = V::block_words * 8;
  for (int chunk = 0; chunk < page.record().format().chunks(); ++chunk) {
    const auto units = page.v_units(chunk);  // (lane,unit,part)
    for (int block = 0; block < layout::kChunkBlocks; ++block) {
      for (int lane = 0; lane < layout::kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const int token = chunk * kChunkTokens + block * layout::kBlockTokens + 2 * t;
        const std::uint8_t* h0 = bytes + token * kRow + g;  // u = 1 is 8 tokens on
        for (int word = 0; word < V::block_words; ++word) {
          const int nth = block * V::v_part_words + word % V::v_part_words;  // in the lane's part
          const std::uint8_t* at = h0 + 8 * word;
          units(lane, nth / V::v_unit_words, word / V::v_part_words).word[nth % V::v_unit_words] =
              word_of(at[0], at[8 * kRow], at[kRow], at[9 * kRow]);
        }
      }
    }
  }
}

template <class Norms>
void divide_by_norms(TokenTile& tile, int tokens, int head_dim, const Norms& norms) {
  for (int n = 0; n < tokens; ++n) {
    std::uint16_t* row = tile.values + n * head_dim;
    const auto k = [row](int c) { return format::float_from_fp16(row[c]); };
    const std::uint16_t norm = format::token_norm(k, head_dim);
    norms(n) = half_t::bitcast(norm);
    for (int c = 0; c < head_dim; ++c) row[c] = format::normalized_key(row[c], norm);
  }
}

template <layout::PageConfig Config>
void pack(const KvFormat& f, int free_tokens, TokenTile& k, const TokenTile& v,
          std::uint8_t* bytes) {
  const layout::PackedKvPage<Config> page(layout::PageRecord(f), bytes);
  std::memset(bytes, 0, static_cast<std::size_t>(page_bytes(f)));
  CodeBytes codes;
  if (f.token_norm) divide_by_norms(k, f.page_tokens, Config.head_dim, page.token_norms());
  constexpr int kKBits = Config.k_bits, kVBits = Config.v_bits, kHeadDim = Config.head_dim;
  const auto store_k = [&] {
    if constexpr (Config.has_blocks()) {
      return storing<kKBits>(page.k_exponents());
    } else {
      return storing<kKBits>(page.k_scales(), page.k_zeros(), f.k_clip);
    }
  }();
  if constexpr (Config.k_axis == KAxis::channel) {
    code_by_channel<kKBits, kHeadDim>(k, f.page_tokens, f.k_group, free_tokens, store_k, codes);
  } else {
    code_by_token<kKBits, kHeadDim, CodeOrder::k>(k, f.page_tokens, f.k_group, store_k, codes);
  }
  store_k_units(page, codes);
  const auto store_v = [&] {
    if constexpr (Config.has_blocks()) {
      return storing<kVBits>(page.v_exponents());
    } else {
      return storing<kVBits>(page.v_scales(), page.v_zeros(), f.v_clip);
    }
  }();
  code_by_token<kVBits, kHeadDim, CodeOrder::v>(v, f.page_tokens, f.v_group, store_v, codes);
  store_v_units(page, codes);
}

}  // namespace

void pack_page(const KvFormat& format, int free_tokens, TokenTile& k, const TokenTile& v,
               std::uint8_t* page) {
  with_page_config(
      format, [&]<layout::PageConfig Config>() { pack<Config>(format, free_tokens, k, v, page); });
}

}  // namespace bitdecoding::cpu
