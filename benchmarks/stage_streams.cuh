// SPDX-License-Identifier: Apache-2.0
// Streams that take the place of decode::Stream in the decode kernel and leave part of its
// arithmetic out: the rest of the kernel (ring, cursor, merges) is the library's. Their outputs are
// finite and mean nothing.
//   CopyOnly  <  CopyAndUnpack  <  WithoutSoftmax  <  decode::Stream
#pragma once

#include "bitdecoding/decode/stream.cuh"

namespace bitdecoding::bench {

using namespace decode;

// Waits for every item, and releases it.
template <DecodeConfig Config, class Groups>
class CopyOnly {
 public:
  using S = Shape<Config>;

  __device__ CopyOnly(const DecodeArguments& a, const Groups& groups, int)
      : a_(a), groups_(groups) {}

  __device__ void load_query(const SegmentPlace&) {}
  __device__ void begin_segment(const SegmentPlace&) {
    softmax_.reset();
    output_.reset();
  }
  __device__ void attend(const ItemTokens&, std::uint8_t*) {}

  __device__ void store(Partial<S>& partial) {
    store_partial<S>(output_, softmax_, groups_, arch::lane_id(), partial);
  }

 protected:
  using Page = layout::PackedKvPage<S::page, std::uint8_t>;

  // chunk(page, is it the item's first): every chunk of a packed item.
  template <class Chunk>
  __device__ void for_chunks(const ItemTokens& tokens, std::uint8_t* bytes, const Chunk& chunk) {
#pragma unroll 1
    for (int token = 0; token < tokens.end; token += kChunkTokens) {
      chunk(Page(a_.record, bytes), token == 0);
      bytes += a_.record.chunk_stride();
    }
  }
  __device__ static const std::uint8_t* zone_values(const std::uint8_t* bytes) {
    return bytes + kZoneTokens * zone_row_bytes(S::head_dim);
  }

  const DecodeArguments& a_;
  Groups groups_;
  Softmax<S> softmax_;
  Output<S, Groups> output_;
};

// ---- copy and unpack ----

// Keeps operands alive that no MMA takes: an xor, which shares an instruction with their mask.
struct Fold {
  std::uint32_t bits[4] = {};

  __device__ void add(const FragmentA& fragment) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      std::uint32_t field = fragment.a[i];
      asm("" : "+r"(field));  // or masks of one word would become one
      bits[i] ^= field;
    }
  }
  // A small number that all bits have a part in.
  __device__ float value() const {
    return __uint_as_float((bits[0] ^ bits[1] ^ bits[2] ^ bits[3]) >> 9);
  }
};

template <Halves S>
__device__ void fold_keys(const KWords<S>& words, Fold& fold) {
#pragma unroll
  for (int tile = 0; tile < S::tiles; ++tile) fold.add(k_halves<S::page.k_bits>(words, tile));
}
template <Bytes S>
__device__ void fold_keys(const KWords<S>& words, Fold& fold) {
#pragma unroll
  for (int pair = 0; pair < S::tiles / 2; ++pair) fold.add(k_bytes<S>(words, pair));
}

// V words of a part of the channels: (word, block).
template <class S>
using PartWords = std::uint32_t[kChunkBlocks * S::V::v_part_words];

template <Halves S>
__device__ void fold_values(const PartWords<S>& words, Fold& fold) {
#pragma unroll
  for (const std::uint32_t word : words) {
#pragma unroll
    for (int tile = 0; tile < S::V::tiles_per_word; ++tile) {
      fold.add(v_halves<S::page.v_bits>(word, tile));
    }
  }
}
template <Bytes S>
__device__ void fold_values(const PartWords<S>& words, Fold& fold) {
  constexpr int kWords = S::V::v_part_words;
#pragma unroll
  for (int i = 0; i < kChunkBlocks / 2 * kWords; ++i) {
    const int first = i / kWords * 2 * kWords + i % kWords;
#pragma unroll
    for (int tile = 0; tile < S::V::tiles_per_word; ++tile) {
      fold.add(v_bytes<S::page.v_bits>(words[first], words[first + kWords], tile));
    }
  }
}

// Every code becomes what MMAs take; 16-bit tokens become operands. No parameters are read.
template <DecodeConfig Config, class Groups>
class CopyAndUnpack : public CopyOnly<Config, Groups> {
 public:
  using S = Shape<Config>;
  using CopyOnly<Config, Groups>::CopyOnly;

  __device__ void attend(const ItemTokens& tokens, std::uint8_t* bytes) {
    if (tokens.flags & ItemTokens::zone) {
      fold_zone(bytes);
      fold_zone(this->zone_values(bytes));
    } else {
      this->for_chunks(tokens, bytes, [&](const auto& page, bool) { fold_chunk(page); });
    }
  }

  __device__ void store(Partial<S>& partial) {
    this->output_.tOrO(0) = fold_.value();
    CopyOnly<Config, Groups>::store(partial);
  }

 private:
  template <class Page>
  __device__ void fold_chunk(const Page& page) {
    const int lane = arch::lane_id();
#pragma unroll
    for (int block = 0; block < kChunkBlocks; ++block) {
      KWords<S> words;
      load_words<S>(page.k_units(0), lane, block, words);
      fold_keys<S>(words, fold_);
    }
    const auto units = page.v_units(0);
#pragma unroll
    for (int part = 0; part < S::V::v_parts; ++part) {
      PartWords<S> words;
#pragma unroll
      for (int unit = 0; unit < S::V::v_units; ++unit) {
        const auto piece = units(lane, unit, part);
#pragma unroll
        for (int i = 0; i < S::V::v_unit_words; ++i) {
          words[unit * S::V::v_unit_words + i] = piece.word[i];
        }
      }
      fold_values<S>(words, fold_);
    }
  }

  // K rows too: as many reads as K's own order takes.
  __device__ void fold_zone(const std::uint8_t* rows) {
    FragmentA operands[S::tiles];
    load_zone_values<S>(rows, kZoneTokens, arch::lane_id(), operands);
#pragma unroll
    for (const FragmentA& operand : operands) fold_.add(operand);
  }

  Fold fold_;
};

// ---- without softmax ----

// O^T += V^T S^T of a chunk: raw scores instead of weights, rounded to fp16.
template <Halves S, class Groups, class Page>
__device__ void add_scores(const Page& page, const ScoreTensor<S, kChunkBlocks>& tSrS, int lane,
                           Output<S, Groups>& output) {
  constexpr int kTurns = 2 / S::n_tiles;
  WeightTensor<S, kChunkBlocks> tOrS;
  make_operand<S, kChunkBlocks>(tSrS, tOrS, [](int, float s) { return s; });
#pragma unroll
  for (int part = 0; part < S::V::v_parts; part += kTurns) {
    add_parts<kTurns, S>(page, part, tOrS, lane, output);
  }
}
// Two bytes of their bits.
template <Bytes S, class Groups, class Page>
__device__ void add_scores(const Page& page, const ScoreTensor<S, kChunkBlocks>& tSrS, int lane,
                           Output<S, Groups>& output) {
  WeightBytes tOrS;
#pragma unroll
  for (int block = 0; block < kChunkBlocks; ++block) {
    const std::uint32_t rows[2] = {__float_as_uint(tSrS(0, 0, block)),
                                   __float_as_uint(tSrS(1, 0, block))};
    tOrS(block % 2, block / 2) = arch::transpose_8x8(__byte_perm(rows[0], rows[1], 0x4051));
  }
#pragma unroll
  for (int part = 0; part < S::V::v_parts; ++part) {
    add_part<S>(page, part, tOrS, 1.f, lane, output);
  }
}

// The same of 16 fp16 tokens.
template <Halves S, class Groups>
__device__ void add_zone_scores(const std::uint8_t* rows, const ScoreTensor<S, 1>& tSrS, int end,
                                int lane, Output<S, Groups>& output) {
  make_true(output);
  WeightTensor<S, 1> tOrS;
  make_operand<S, 1>(tSrS, tOrS, [](int, float s) { return s; });
  FragmentA tOrV[S::tiles];
  load_zone_values<S>(rows, end, lane, tOrV);
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
#pragma unroll
    for (int n = 0; n < S::n_tiles; ++n) {
      mma(mma_tile<S>(output.tOrO, n, k), tOrV[k], tOrS(_, n, 0));
    }
  }
}
template <Bytes S, class Groups>
__device__ void add_zone_scores(const std::uint8_t* rows, const ScoreTensor<S, 1>& tSrS, int end,
                                int lane, Output<S, Groups>& output) {
  auto tOrS = cute::make_tensor<std::uint32_t>(cute::Shape<_2>{});
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    tOrS(row) = arch::transpose_8x8(as_bits(__floats2half2_rn(tSrS(row, 0, 0), 0.f)));
  }
  FragmentA tOrV[S::tiles];
  load_zone_values<S>(rows, end, lane, tOrV);
#pragma unroll
  for (int k = 0; k < S::tiles; ++k) {
    auto sums = cute::make_tensor<float>(cute::Shape<_4>{});
    cute::clear(sums);
    mma(sums, tOrV[k], tOrS);
    output.tOrO(0, 0, k) += sums(0);
    output.tOrO(1, 0, k) += sums(2);
  }
}

// Both products, and Q' of every group. Left out are masks, maximum, exponentials and their sums,
// and what zero-points and V's scales add to weights.
template <DecodeConfig Config, class Groups>
class WithoutSoftmax : public CopyOnly<Config, Groups> {
 public:
  using S = Shape<Config>;
  static_assert(S::page.k_axis == KAxis::channel, "per-token K finishes its scores in place");

  __device__ WithoutSoftmax(const DecodeArguments& a, const Groups& groups, int lane)
      : CopyOnly<Config, Groups>(a, groups, lane), lane_(lane) {}

  __device__ void load_query(const SegmentPlace& segment) {
    decode::load_query<S>(this->a_, segment, S::columns, 0, arch::lane_id(), query_.q);
  }
  __device__ void begin_segment(const SegmentPlace& segment) {
    CopyOnly<Config, Groups>::begin_segment(segment);
    set_query<S>(query_.q, query_.scale, this->a_.problem, arch::lane_id());
  }

  __device__ void attend(const ItemTokens& tokens, std::uint8_t* bytes) {
    if (tokens.flags & ItemTokens::zone) {
      const int lane = arch::lane_id();
      ScoreTensor<S, 1> tSrS;
      score_zone<S>(bytes, query_.q, lane, tSrS);
      add_zone_scores<S>(this->zone_values(bytes), tSrS, tokens.end, lane, this->output_);
      return;
    }
    this->for_chunks(tokens, bytes, [&](const auto& page, bool is_first) {
      const int begins = is_first ? ItemTokens::new_group : ItemTokens::later_groups;
      ScoreTensor<S, kChunkBlocks> tSrS;
      score_channel_axis<S>(page, this->groups_, query_, (tokens.flags & begins) != 0, lane_, tSrS,
                            scale_);
      add_scores<S>(page, tSrS, lane_, this->output_);
    });
  }

 private:
  int lane_;
  Query<S> query_;
  ScoreScale<S, Groups::kMostChunkGroups> scale_;  // not applied
};

}  // namespace bitdecoding::bench
