// SPDX-License-Identifier: Apache-2.0
// The packed KV tensor: the record of one (page, KV head) as CuTe tensors over (token, channel).
// Kernels, the CPU backend and the tests reach page bytes through it and through nothing else.
//   N = page_tokens, D = head_dim      Byte = std::uint8_t, or const std::uint8_t to read only
#pragma once

#include <cute/tensor.hpp>

#include <cutlass/numeric_types.h>

#include <cstdint>
#include <type_traits>

#include "bitdecoding/layout/code_layout.hpp"
#include "bitdecoding/layout/page_config.hpp"
#include "bitdecoding/layout/parameter_layout.hpp"

namespace bitdecoding::layout {

template <int Bits>
using Code = std::conditional_t<Bits == 2, cute::uint2_t, cute::uint4_t>;

// One lane's unit of K codes (16 or 8 bytes) and of V codes (16 bytes).
template <int Words>
struct alignas(4 * Words) Unit {
  std::uint32_t word[Words];
};

template <PageConfig Config, class Byte = std::uint8_t>
class PackedKvPage {
 public:
  static constexpr PageConfig config = Config;
  using K = CodeShape<Config.k_bits, Config.head_dim>;
  using V = CodeShape<Config.v_bits, Config.head_dim>;
  using KUnit = Unit<K::k_unit_words>;
  using VUnit = Unit<V::v_unit_words>;

  // `bytes`: the first byte of the record, 16-byte aligned. The format must match `Config`.
  CUTE_HOST_DEVICE constexpr PackedKvPage(const PageRecord& record, Byte* bytes)
      : record_(record), bytes_(bytes) {}

  CUTE_HOST_DEVICE constexpr const PageRecord& record() const { return record_; }

  // ---- codes, one element each ----
  CUTE_HOST_DEVICE constexpr auto k_codes() const {  // (N,D)
    return codes<Config.k_bits>(record_.k_codes(0),
                                k_code_layout<Config.k_bits, Config.head_dim>());
  }
  CUTE_HOST_DEVICE constexpr auto v_codes() const {  // (N,D)
    return codes<Config.v_bits>(record_.v_codes(0),
                                v_code_layout<Config.v_bits, Config.head_dim>());
  }

  // ---- codes, as the units that lanes read and write ----
  CUTE_HOST_DEVICE constexpr auto k_units(int chunk) const {  // (lane,unit,block)
    return view<KUnit>(record_.k_codes(chunk), k_unit_layout<Config.k_bits, Config.head_dim>());
  }
  CUTE_HOST_DEVICE constexpr auto v_units(int chunk) const {  // (lane,unit,part)
    return view<VUnit>(record_.v_codes(chunk), v_unit_layout<Config.v_bits, Config.head_dim>());
  }

  // ---- parameters, as the 16-byte vectors that lanes read ----
  // A channel-axis K group: lane t's pairs of all channels.
  CUTE_HOST_DEVICE constexpr auto k_group_vectors(int group) const {  // (t,piece,scale|zero)
    using namespace cute;
    constexpr int kPieces = Config.head_dim / 32;
    return view<uint4>(
        record_.k_group_bytes() * group,
        Layout<Shape<_4, Int<kPieces>, _2>, Stride<Int<kPieces>, _1, Int<4 * kPieces>>>{});
  }
  // A channel group of the first chunk's tokens 8i + g, i = 0..7.
  CUTE_HOST_DEVICE constexpr auto k_token_vectors(int group) const {  // (g,scale|zero)
    return token_vectors(record_.k_token_parameters(0), group);
  }
  CUTE_HOST_DEVICE constexpr auto v_token_vectors(int group) const {  // (g,scale|zero)
    return token_vectors(record_.v_parameters(0), group);
  }
  CUTE_HOST_DEVICE constexpr auto norm_vectors() const {  // (g)
    return view<uint4>(record_.token_norms(0), cute::Layout<cute::_8>{});
  }

  // Of blocks: exponents of the first chunk's tokens 8i + g, eight bytes.
  CUTE_HOST_DEVICE constexpr auto k_exponent_vectors(int block) const {  // (g)
    return exponent_vectors(record_.k_token_parameters(0), block);
  }
  CUTE_HOST_DEVICE constexpr auto v_exponent_vectors(int block) const {  // (g)
    return exponent_vectors(record_.v_parameters(0), block);
  }

  // ---- parameters; elements of one group alias one fp16, those of a block one byte ----
  CUTE_HOST_DEVICE constexpr auto k_scales() const { return k_parameters(0); }              // (N,D)
  CUTE_HOST_DEVICE constexpr auto k_zeros() const { return k_parameters(kKZeroDistance); }  // (N,D)
  CUTE_HOST_DEVICE constexpr auto v_scales() const { return v_parameters(0); }              // (N,D)
  CUTE_HOST_DEVICE constexpr auto v_zeros() const { return v_parameters(kChunkTokens); }    // (N,D)
  CUTE_HOST_DEVICE constexpr auto k_exponents() const {                                     // (N,D)
    return view<std::uint8_t>(record_.k_token_parameters(0), exponent_layout(record_));
  }
  CUTE_HOST_DEVICE constexpr auto v_exponents() const {  // (N,D)
    return view<std::uint8_t>(record_.v_parameters(0), exponent_layout(record_));
  }
  // Only where the format has token norms.
  CUTE_HOST_DEVICE constexpr auto token_norms() const {  // (N)
    return view<cutlass::half_t>(record_.token_norms(0), token_order_layout(record_));
  }

 private:
  template <class Element>
  using Like = std::conditional_t<std::is_const_v<Byte>, const Element, Element>;

  static constexpr int kKZeroDistance =
      Config.k_axis == KAxis::channel ? Config.head_dim : kChunkTokens;

  template <class Element, class LayoutType>
  CUTE_HOST_DEVICE constexpr auto view(int offset_bytes, const LayoutType& layout) const {
    return cute::make_tensor(reinterpret_cast<Like<Element>*>(bytes_ + offset_bytes), layout);
  }

  CUTE_HOST_DEVICE constexpr auto token_vectors(int offset_bytes, int group) const {
    using namespace cute;
    return view<uint4>(offset_bytes + group * 2 * kChunkTokens * kParameter_bytes,
                       Layout<Shape<_8, _2>, Stride<_1, _8>>{});
  }

  CUTE_HOST_DEVICE constexpr auto exponent_vectors(int offset_bytes, int block) const {
    return view<uint2>(offset_bytes + block * kChunkTokens * kExponent_bytes,
                       cute::Layout<cute::_8>{});
  }

  template <int Bits, class LayoutType>
  CUTE_HOST_DEVICE constexpr auto codes(int offset_bytes, const LayoutType& chunk_layout) const {
    using namespace cute;
    const int chunk_codes = record_.chunk_stride() * 8 / Bits;
    const auto chunks = make_layout(record_.format().chunks(), chunk_codes);
    const auto layout = make_layout(make_layout(get<0>(chunk_layout), chunks),  // ((64,chunk),D)
                                    get<1>(chunk_layout));
    return make_tensor(subbyte_iterator<Like<Code<Bits>>>(bytes_ + offset_bytes), layout);
  }

  CUTE_HOST_DEVICE constexpr auto k_parameters(int distance) const {
    if constexpr (Config.k_axis == KAxis::channel) {
      return view<cutlass::half_t>(record_.k_group(0) + distance * kParameter_bytes,
                                   channel_parameter_layout<Config.head_dim>(record_));
    } else {
      return view<cutlass::half_t>(record_.k_token_parameters(0) + distance * kParameter_bytes,
                                   token_parameter_layout(record_, record_.format().k_group));
    }
  }
  CUTE_HOST_DEVICE constexpr auto v_parameters(int distance) const {
    return view<cutlass::half_t>(record_.v_parameters(0) + distance * kParameter_bytes,
                                 token_parameter_layout(record_, record_.format().v_group));
  }

  PageRecord record_;
  Byte* bytes_;
};

}  // namespace bitdecoding::layout
